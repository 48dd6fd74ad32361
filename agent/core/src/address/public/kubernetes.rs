//! The answer of a cluster's API server about a node.

use std::net::IpAddr;

use serde::Deserialize;

/// Why an answer has no address.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NodeError {
    /// 401.
    #[error("the API server does not take the service account's token")]
    Unauthorized,
    /// 403.
    #[error("the service account may not read nodes: grant it `get` on `nodes`")]
    Forbidden,
    /// 404.
    #[error("the cluster has no node {0}: set `public_address.node_name`")]
    NoNode(String),
    /// Another status that is no success.
    #[error("the API server answered {0}")]
    Status(u16),
    /// The body is no Node.
    #[error("the answer is no Node: {0}")]
    NotANode(String),
}

#[derive(Debug, Deserialize)]
struct Node {
    #[serde(default)]
    status: NodeStatus,
}

#[derive(Debug, Default, Deserialize)]
struct NodeStatus {
    #[serde(default)]
    addresses: Vec<NodeAddress>,
}

#[derive(Debug, Deserialize)]
struct NodeAddress {
    #[serde(rename = "type")]
    kind: String,
    address: String,
}

/// The first ExternalIP of `local`'s family in the answer about the node `name`.
///
/// # Errors
/// When the answer is a refusal, or no Node.
pub fn external_ip(
    status: u16,
    body: &str,
    name: &str,
    local: Option<IpAddr>,
) -> Result<Option<IpAddr>, NodeError> {
    match status {
        200 => {}
        401 => return Err(NodeError::Unauthorized),
        403 => return Err(NodeError::Forbidden),
        404 => return Err(NodeError::NoNode(name.to_owned())),
        status => return Err(NodeError::Status(status)),
    }
    let node: Node =
        serde_json::from_str(body).map_err(|error| NodeError::NotANode(error.to_string()))?;
    let addresses = node.status.addresses.iter();
    let mut external = addresses
        .filter(|address| address.kind == "ExternalIP")
        .filter_map(|address| address.address.parse::<IpAddr>().ok());
    Ok(external.find(|address| {
        local.is_none_or(|local| local.to_canonical().is_ipv4() == address.is_ipv4())
    }))
}
