//! The ExternalIP of our node, by the API server of the cluster that we run in.

use std::{
    net::IpAddr,
    path::{Path, PathBuf},
};

use ::http::{Method, StatusCode, header::AUTHORIZATION};
use serde::Deserialize;

use super::{
    LookupError,
    http::{Answer, BaseUrl, Trust},
};

/// Where a pod finds its service account.
pub const IN_CLUSTER_ACCOUNT: &str = "/var/run/secrets/kubernetes.io/serviceaccount";

/// A node of a cluster.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KubernetesNode {
    /// The API server.
    pub api: BaseUrl,
    /// The node's name.
    pub name: String,
    /// The directory with `token` and `ca.crt`.
    pub account: PathBuf,
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

impl KubernetesNode {
    /// The first ExternalIP of `local`'s family.
    pub(super) async fn external_ip(
        &self,
        local: Option<IpAddr>,
    ) -> Result<Option<IpAddr>, LookupError> {
        // Read each time: Kubernetes replaces a token before it expires.
        let token = read(&self.account.join("token"))?;
        let bearer = format!("Bearer {}", token.trim());
        let path = format!("/api/v1/nodes/{}", self.name);
        let trust = Trust::File(self.account.join("ca.crt"));
        let headers = [
            (AUTHORIZATION.as_str(), bearer.as_str()),
            ("accept", "application/json"),
        ];
        let answer = self
            .api
            .exchange(Method::GET, &path, &headers, &trust)
            .await?;
        self.external_ip_in(&answer, local)
            .map_err(|cause| LookupError::Answer {
                url: self.api.at(&path),
                cause,
            })
    }

    fn external_ip_in(
        &self,
        answer: &Answer,
        local: Option<IpAddr>,
    ) -> Result<Option<IpAddr>, String> {
        match answer.status {
            StatusCode::OK => {}
            StatusCode::UNAUTHORIZED => {
                return Err("the API server does not take the service account's token".to_owned());
            }
            StatusCode::FORBIDDEN => {
                return Err(
                    "the service account may not read nodes: grant it `get` on `nodes`".to_owned(),
                );
            }
            StatusCode::NOT_FOUND => {
                return Err(format!(
                    "the cluster has no node {}: set `public_address.node_name`",
                    self.name
                ));
            }
            status => return Err(format!("the API server answered {}", status.as_u16())),
        }
        let node: Node = serde_json::from_str(&answer.body)
            .map_err(|error| format!("the answer is no Node: {error}"))?;
        let mut external = node
            .status
            .addresses
            .iter()
            .filter(|address| address.kind == "ExternalIP")
            .filter_map(|address| address.address.parse::<IpAddr>().ok());
        Ok(external.find(|address| {
            local.is_none_or(|local| local.to_canonical().is_ipv4() == address.is_ipv4())
        }))
    }
}

/// The files of a service account are in memory: reading one does not block.
fn read(path: &Path) -> Result<String, LookupError> {
    std::fs::read_to_string(path).map_err(|cause| LookupError::File {
        path: path.to_owned(),
        cause,
    })
}
