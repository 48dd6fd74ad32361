//! The ExternalIP of our node, by the API server of the cluster that we run in.

use std::{
    net::IpAddr,
    path::{Path, PathBuf},
};

use ::http::{Method, header::AUTHORIZATION};
use nsm_core::address::public::kubernetes::external_ip;

use super::{
    LookupError,
    http::{BaseUrl, Trust},
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
        external_ip(answer.status.as_u16(), &answer.body, &self.name, local).map_err(|cause| {
            LookupError::Answer {
                url: self.api.at(&path),
                cause: cause.to_string(),
            }
        })
    }
}

/// The files of a service account are in memory: reading one does not block.
fn read(path: &Path) -> Result<String, LookupError> {
    std::fs::read_to_string(path).map_err(|cause| LookupError::File {
        path: path.to_owned(),
        cause,
    })
}
