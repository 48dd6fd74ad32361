//! `proxy-nsmgr health`: whether an agent is ready, by gRPC health over TLS where it speaks TLS. Kubernetes' own gRPC probe has no TLS.

use std::sync::Arc;

use anyhow::{Context as _, bail};
use nsm_controlplane::transport::{dial::dial_with, tls::alert};
use tokio::task::JoinSet;
use tonic_health::pb::{
    HealthCheckRequest, health_check_response::ServingStatus, health_client::HealthClient,
};

use crate::{
    cli::HealthArgs,
    tool::{open_identity, print_line, shown},
};

/// Asks the agent, and succeeds where it is ready.
///
/// # Errors
///
/// It is not ready, or cannot be reached in time.
pub(crate) async fn run(args: &HealthArgs) -> anyhow::Result<()> {
    let asking = tokio::time::timeout(args.timeout, ask(args));
    let (url, timeout) = (&args.connect_to, args.timeout);
    let asked = asking
        .await
        .with_context(|| format!("{url} gave no answer within {timeout:?}"))?;
    match asked? {
        ServingStatus::Serving => print_line("ready"),
        _ => bail!("{url} is not ready: `proxy-nsmgr status` there shows what it waits for"),
    }
}

async fn ask(args: &HealthArgs) -> anyhow::Result<ServingStatus> {
    let mut following = JoinSet::new();
    let tls = open_identity(&args.identity, args.timeout, &mut following).await?;
    let url = &args.connect_to;
    let link = dial_with(url, &Arc::default(), tls.as_ref(), args.timeout).await?;
    let asked = HealthClient::new(link.channel)
        .check(HealthCheckRequest::default())
        .await;
    match asked {
        Ok(answer) => Ok(answer.into_inner().status()),
        Err(status) => match alert(&status) {
            Some(refusal) => bail!("{url}: {refusal}"),
            None => bail!("{url}: {}", shown(status.message())),
        },
    }
}
