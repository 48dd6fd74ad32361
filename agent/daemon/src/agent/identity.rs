//! The agent's identity: readiness waits for it, and its end is watched.

use std::{
    sync::Arc,
    time::{Duration, SystemTime},
};

use nsm_controlplane::{identity::source::Identity, transport::tls::Tls};
use tokio::{task::JoinSet, time::interval};

use super::readiness::Readiness;
use crate::{config::Config, identity};

/// How often it is looked how long the SVID lives.
const INTERVAL: Duration = Duration::from_secs(10);

/// What an agent in plain text is.
const INSECURE: &str = "`insecure` is set: everybody who reaches this agent may ask, register and monitor in anybody's name";

/// TLS by the configured identity, whose source is followed by `tasks`; none where the agent speaks plain text. The agent is not ready
/// before there is an SVID.
///
/// # Errors
/// The files are no identity.
pub(crate) fn start(
    config: &Config,
    readiness: &Readiness,
    tasks: &mut JoinSet<()>,
) -> anyhow::Result<Option<Arc<Tls>>> {
    let Some(source) = config.identity.source() else {
        if config.insecure {
            tracing::warn!("{INSECURE}");
        }
        return Ok(None);
    };
    let (tls, following) = identity::open(source)?;
    tasks.spawn(following);
    let identity = tls.identity().clone();
    let guard = format!("an SVID from {}", identity.origin());
    readiness.wait_for(guard.clone());
    tasks.spawn(watch(identity, readiness.clone(), guard));
    Ok(Some(tls))
}

/// Waits for the first SVID, then reports one that is not renewed.
async fn watch(identity: Identity, readiness: Readiness, guard: String) {
    identity.arrived().await;
    readiness.arrived(&guard);
    let mut tick = interval(INTERVAL);
    let mut shown = Vec::new();
    loop {
        tick.tick().await;
        let now: Vec<String> = late(&identity, SystemTime::now()).into_iter().collect();
        if now != shown {
            if let Some(reason) = now.first() {
                tracing::warn!("{reason}");
            }
            readiness.replace_degradations(&shown, now.clone());
            shown = now;
        }
    }
}

/// What is wrong with the life of our SVID: SPIRE renews one at half of its life.
fn late(identity: &Identity, now: SystemTime) -> Option<String> {
    let current = identity.current().ok()?;
    let svid = &current.svid;
    let (left, origin) = (svid.left(now), identity.origin());
    if left.is_zero() {
        Some(format!(
            "the SVID of {} has ended, and every peer refuses it: {origin} has not renewed it",
            svid.id()
        ))
    } else if left < svid.life() / 4 {
        let minutes = left.as_secs() / 60;
        Some(format!(
            "the SVID of {} ends in {minutes} minutes, after three quarters of its life: {origin} has not renewed it",
            svid.id()
        ))
    } else {
        None
    }
}
