//! `proxy-nsmgr endpoint`: an NSM v1 endpoint for people.
//!
//! It serves NetworkService and MonitorConnection on a socket of its own, registers that with the
//! agent, and gives each connection addresses, an interface's name and its namespace; the agent
//! makes the interface. It opens no namespace and needs no rights but to reach the agent's socket.
//!
//! The order of the end matters: out of the registry first, so that no new client is sent here;
//! then the connections are closed and their end published; then the socket goes.

use anyhow::Context as _;
use nsm_controlplane::identity::token::TokenSource;
use tokio::sync::oneshot;

use crate::{
    cli::{EndpointArgs, label_map},
    netns::Netns,
    tool::{Agent, Stop, goodbye, random_name},
};

mod addresses;
mod book;
mod registration;
mod report;
mod server;
mod socket;

use self::{
    addresses::Addresses,
    book::{Book, Identity},
    registration::Registration,
    report::Reporter,
    server::Endpoint,
};

/// Serves until Ctrl-C or SIGTERM.
///
/// # Errors
///
/// The namespace or prefixes are none, the socket cannot be made, the agent does not run, or its
/// registry refuses.
pub(crate) async fn run(args: &EndpointArgs) -> anyhow::Result<()> {
    let reporter = Reporter::new(args.client.json);
    let result = serve(args, reporter).await;
    if let Err(error) = &result {
        reporter.failed(&format!("{error:#}"));
    }
    result
}

async fn serve(args: &EndpointArgs, reporter: Reporter) -> anyhow::Result<()> {
    let mut stop = Stop::new()?;
    let netns = Netns::open(&args.netns)?;
    let addresses = Addresses::new(&args.prefixes)?;
    let name = args
        .name
        .clone()
        .unwrap_or_else(|| random_name(&args.services[0]));
    let payload = args.payload.as_str();
    let agent = Agent::connect(&args.client, &name).await?;
    let (listener, file) = socket::listen(args.listen.as_deref(), &name)?;
    let identity = Identity {
        name: name.clone(),
        services: args.services.clone(),
        payload,
        netns,
    };
    let tokens = TokenSource::hs256(
        agent.tokens.spiffe_id(),
        args.client.token_secret.as_bytes(),
        args.client.max_token_lifetime,
    );
    let tls = agent.tls.clone();
    let endpoint = Endpoint::new(Book::new(identity, addresses), tokens, reporter);
    let mut registration = Registration::new(
        agent,
        &name,
        &args.services,
        &label_map(&args.labels),
        payload,
        file.path(),
    );

    let (end, ended) = oneshot::channel::<()>();
    // Its sender is gone at the latest when we are.
    let serving = endpoint.serve(listener, tls, async {
        let _ = ended.await;
    });
    tokio::pin!(serving);
    let mut is_serving = true;
    let result = tokio::select! {
        result = register_and_keep(&mut registration, reporter) => result,
        broken = &mut serving => {
            is_serving = false;
            broken.context("the endpoint's socket broke")
        }
        () = endpoint.expire() => Ok(()),
        () = stop.wait() => Ok(()),
    };
    goodbye(&mut stop, async {
        let unregister = async {
            let unregistered = registration.unregister().await;
            let error = unregistered.err().map(|error| error.to_string());
            reporter.unregistered(error.as_deref());
            endpoint.end();
            // Gone already where serving broke.
            let _ = end.send(());
        };
        let served = async {
            if is_serving && let Err(error) = serving.await {
                reporter.error(&error.to_string());
            }
        };
        tokio::join!(served, unregister);
    })
    .await;
    drop(file);
    result
}

/// Registers, and keeps it so; ends only where the first try fails.
async fn register_and_keep(
    registration: &mut Registration,
    reporter: Reporter,
) -> anyhow::Result<()> {
    let expires = registration.register().await.context("cannot register")?;
    reporter.registered(registration.entry(), expires, None);
    registration.keep(expires, reporter).await;
    Ok(())
}
