//! `proxy-nsmgr drain`: has the agent on this node close everything and end.

use std::time::Duration;

use anyhow::Context as _;
use nsm_controlplane::transport::dial::dial;
use nsm_core::net::PeerUrl;
use nsm_proto::admin::{DrainRequest, DrainResponse, admin_client::AdminClient};
use tonic::transport::Channel;

use crate::{
    cli::DrainArgs,
    observe::status::{DIAL_TIMEOUT, no_agent, refused},
    tool::print_line,
};

/// How long the agent may take to close its connections and to remove what it made: longer than it gives itself.
const TIMEOUT: Duration = Duration::from_secs(30);

/// Asks the agent, waits until it has removed what it made, and prints what was closed. The agent ends a moment later.
///
/// # Errors
///
/// No agent answers on the admin socket, it refuses, or it could not close all.
pub(crate) async fn run(args: &DrainArgs) -> anyhow::Result<()> {
    let admin = &args.admin;
    let channel = dial(admin, DIAL_TIMEOUT)
        .await
        .with_context(|| no_agent(admin))?;
    let DrainResponse { closed, left } = ask(admin, channel).await?;
    print_line(&format!("closed {closed} connections; the agent ends"))?;
    anyhow::ensure!(
        left == 0,
        "{left} connections could not be closed in time: the other side has them until their tokens end"
    );
    Ok(())
}

async fn ask(admin: &PeerUrl, channel: Channel) -> anyhow::Result<DrainResponse> {
    let mut request = tonic::Request::new(DrainRequest {});
    request.set_timeout(TIMEOUT);
    let mut client = AdminClient::new(channel);
    match tokio::time::timeout(TIMEOUT, client.drain(request)).await {
        Ok(Ok(response)) => Ok(response.into_inner()),
        Ok(Err(status)) => Err(refused(admin, &status)),
        Err(_) => {
            anyhow::bail!("{admin} took the connection and gave no answer within {TIMEOUT:?}")
        }
    }
}
