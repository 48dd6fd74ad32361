//! The identity of this process, agent or tool: where it comes from, and that it is followed.

use std::{pin::Pin, sync::Arc, time::Duration};

use anyhow::Context as _;
use nsm_controlplane::{
    identity::{
        pem::{PemFiles, PemTexts},
        source::Identity,
        workload_api,
    },
    transport::tls::Tls,
};
use tokio::time::{MissedTickBehavior, interval};

use crate::config::IdentitySource;

/// How soon a change of the files is noticed. They are read and compared: on Kubernetes a Secret changes behind symbolic links, which a
/// watch on the files does not see.
const INTERVAL: Duration = Duration::from_secs(1);

/// What follows a source of the identity, for ever.
pub(crate) type Following = Pin<Box<dyn Future<Output = ()> + Send>>;

/// TLS by an identity of this source, and what follows the source. A Workload API may be away; files must be there.
///
/// # Errors
/// The files are no identity.
pub(crate) fn open(source: IdentitySource) -> anyhow::Result<(Arc<Tls>, Following)> {
    let files = match source {
        IdentitySource::Files(files) => files,
        IdentitySource::WorkloadApi(socket) => {
            let origin = format!("the Workload API at {}", socket.display());
            let identity = Identity::from_source(&origin);
            let tls = Arc::new(Tls::of(identity.clone()));
            return Ok((tls, Box::pin(workload_api::follow(socket, identity))));
        }
    };
    let origin = format!("the file {}", files.certificate.display());
    let identity = Identity::from_source(&origin);
    let texts = load(&files, &identity).context("the identity cannot be used (`identity`)")?;
    let tls = Arc::new(Tls::of(identity.clone()));
    Ok((tls, Box::pin(follow(files, identity, texts))))
}

fn load(files: &PemFiles, identity: &Identity) -> anyhow::Result<PemTexts> {
    let texts = files.read()?;
    let (svid, bundles) = files.parse(&texts)?;
    identity.replace(svid, bundles);
    Ok(texts)
}

/// Follows the files for ever. What cannot be read, or is no identity, changes nothing: chain and key are written one after the other.
async fn follow(files: PemFiles, identity: Identity, mut known: PemTexts) {
    let mut tick = interval(INTERVAL);
    tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut last_error = None;
    loop {
        tick.tick().await;
        let reading = files.clone();
        let Ok(read) = tokio::task::spawn_blocking(move || reading.read()).await else {
            continue;
        };
        if read.as_ref().is_ok_and(|texts| *texts == known) {
            last_error = None;
            continue;
        }
        let parsed = read.and_then(|texts| Ok((files.parse(&texts)?, texts)));
        match parsed {
            Ok(((svid, bundles), texts)) => {
                tracing::info!(id = %svid.id(), "took over the identity in the files");
                identity.replace(svid, bundles);
                known = texts;
                last_error = None;
            }
            Err(error) => {
                let error = error.to_string();
                // Said the second time, too late for files that are being written.
                if last_error.as_ref() == Some(&error) {
                    tracing::debug!(error, "the identity stays as it was");
                } else {
                    tracing::warn!(error, "the identity stays as it was");
                }
                last_error = Some(error);
            }
        }
    }
}
