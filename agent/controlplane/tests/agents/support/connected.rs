//! A connection between two domains: what many scenarios begin with.

use std::sync::Arc;

use super::{Client, Endpoint, Granted, Held, World};

/// The service that the scenarios of two domains ask for.
pub(crate) const SERVICE: &str = "icmp-responder@cluster-2.example";

/// A client in the first of two domains, with a connection to an endpoint in the second.
pub(crate) struct Connected {
    pub(crate) world: World,
    pub(crate) endpoint: Arc<Endpoint>,
    /// What was held before the client came.
    before: Held,
    pub(crate) client: Client,
    pub(crate) granted: Granted,
}

impl Connected {
    /// Builds the world, and asks for the connection.
    pub(crate) async fn new() -> Self {
        let world = World::two().await;
        let [a, b] = world.agents();
        let endpoint = world.endpoint(b, "nse-1", "icmp-responder").await;
        let before = world.held();
        let client = Client::on_node(a).await;
        let granted = client.ask(SERVICE).await;
        Self {
            world,
            endpoint,
            before,
            client,
            granted,
        }
    }

    /// Waits until nothing is held of what came after the connection was asked for.
    pub(crate) async fn settles(&self) {
        self.world.settles(&self.before).await;
    }
}
