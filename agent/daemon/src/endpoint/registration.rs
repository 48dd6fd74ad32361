//! The endpoint's entry in the registry, kept alive.
//!
//! It is registered again at two thirds of its life. An agent that restarts has forgotten it: a
//! watch on our own name ends with the agent, so that the endpoint is back as soon as the agent is
//! and not when the old entry would have expired.
//!
//! Its services are registered only where the registry does not have them: a registration by the name alone would remove the matches
//! that an operator has given one.

use std::{
    collections::BTreeMap,
    fs::File,
    io,
    os::{
        fd::OwnedFd,
        unix::fs::{MetadataExt as _, OpenOptionsExt as _},
    },
    path::{Path, PathBuf},
    time::{Duration, SystemTime},
};

use nix::fcntl::OFlag;
use nsm_core::{backoff::Backoff, net::PeerUrl, nsm::expiry::refresh_after};
use nsm_proto::registry::{
    NetworkService, NetworkServiceEndpoint, NetworkServiceEndpointQuery, NetworkServiceLabels,
    NetworkServiceQuery,
    network_service_endpoint_registry_client::NetworkServiceEndpointRegistryClient as Endpoints,
    network_service_registry_client::NetworkServiceRegistryClient as Services,
};
use prost_types::Timestamp;
use tonic::{Code, Request, Response, metadata::AsciiMetadataValue};

use super::report::{Again, Reporter};
use crate::tool::{Agent, CallError};

/// The shortest wait before another try: an agent that restarts is back within it.
const SHORTEST_WAIT: Duration = Duration::from_millis(200);

/// The longest: a registration lives for a minute, and a third of that is left when it fails.
const LONGEST_WAIT: Duration = Duration::from_secs(5);

/// A descriptor of the socket's file, and the name that goes with it.
fn open(socket: &Path) -> io::Result<(String, OwnedFd)> {
    // A socket's file can be opened in no other way.
    let file = File::options()
        .read(true)
        .custom_flags(OFlag::O_PATH.bits())
        .open(socket)?;
    let metadata = file.metadata()?;
    let url = format!("inode://{}/{}", metadata.dev(), metadata.ino());
    Ok((url, file.into()))
}

/// The entry of the endpoint.
#[derive(Debug)]
pub(crate) struct Registration {
    agent: Agent,
    payload: &'static str,
    entry: NetworkServiceEndpoint,
    /// Its services as they were found last.
    offered: BTreeMap<String, NetworkService>,
    socket: PathBuf,
}

impl Registration {
    /// The entry of `name`, which serves `services` at `url`.
    pub(crate) fn new(
        agent: Agent,
        name: &str,
        services: &[String],
        labels: &BTreeMap<String, String>,
        payload: &'static str,
        socket: &Path,
    ) -> Self {
        let labels = |service: &String| {
            let labels = NetworkServiceLabels {
                labels: labels.clone(),
            };
            (service.clone(), labels)
        };
        let entry = NetworkServiceEndpoint {
            name: name.to_owned(),
            network_service_names: services.to_vec(),
            network_service_labels: services.iter().map(labels).collect(),
            url: PeerUrl::unix(socket).to_string(),
            ..NetworkServiceEndpoint::default()
        };
        Self {
            socket: socket.to_owned(),
            agent,
            payload,
            entry,
            offered: BTreeMap::new(),
        }
    }

    /// Registers the services and the endpoint; gives the time at which that expires.
    ///
    /// # Errors
    ///
    /// The registry refuses or gives no answer.
    pub(crate) async fn register(&mut self) -> Result<SystemTime, CallError> {
        self.offer_services().await?;
        let mut endpoints = Endpoints::new(self.agent.channel.clone());
        // It lives as long as our token at most; the registry shortens that as it likes.
        let expires = self.agent.token().expires;
        let mut entry = NetworkServiceEndpoint {
            expiration_time: Some(Timestamp::from(expires)),
            ..self.entry.clone()
        };
        // One that cannot be opened any more is refused as one that is only named.
        if self.agent.wants_descriptor()
            && let Ok((url, descriptor)) = open(&self.socket)
        {
            entry.url = url;
            self.agent.pass(descriptor);
        }
        let request = self.call(entry);
        let granted = self
            .agent
            .answer(endpoints.register(request))
            .await?
            .into_inner();
        if granted.name.is_empty() {
            return Err(self.agent.bad_answer("a registration without a name"));
        }
        // The registry may have given it another name, to distinguish it from an older one.
        self.entry.name = granted.name;
        self.entry.initial_registration_time = granted.initial_registration_time;
        let expires = granted
            .expiration_time
            .and_then(|time| SystemTime::try_from(time).ok())
            .unwrap_or(expires);
        Ok(expires)
    }

    /// Registers the services that the registry does not have. Whose a service is decides what it carries and which clients it is for
    /// (its matches): one that is there is left as it is, and one that a registry has lost comes back as it was found last.
    async fn offer_services(&mut self) -> Result<(), CallError> {
        let mut services = Services::new(self.agent.channel.clone());
        for name in self.entry.network_service_names.clone() {
            if let Some(found) = self.find_service(&name).await? {
                let is_same = found.payload == self.payload;
                self.offered.insert(name.clone(), found);
                if is_same {
                    continue;
                }
            }
            let known = self.offered.get(&name).cloned().unwrap_or_default();
            let service = NetworkService {
                name,
                payload: self.payload.to_owned(),
                matches: known.matches,
                ..NetworkService::default()
            };
            let request = self.call(service);
            self.agent.answer(services.register(request)).await?;
        }
        Ok(())
    }

    /// The service of exactly this name; none, too, where the registry finds no services.
    async fn find_service(&self, name: &str) -> Result<Option<NetworkService>, CallError> {
        let query = NetworkServiceQuery {
            network_service: Some(NetworkService {
                name: name.to_owned(),
                ..NetworkService::default()
            }),
            watch: false,
        };
        let mut services = Services::new(self.agent.channel.clone());
        let searching = async {
            let mut found = services.find(self.call(query)).await?.into_inner();
            // Registries understand names as patterns, too.
            while let Some(response) = found.message().await? {
                let service = response.network_service.unwrap_or_default();
                if service.name == name {
                    return Ok(Response::new(Some(service)));
                }
            }
            Ok(Response::new(None))
        };
        match self.agent.answer(searching).await {
            Ok(found) => Ok(found.into_inner()),
            Err(CallError::Refused {
                code: Code::Unimplemented | Code::NotFound,
                ..
            }) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Keeps the entry alive from `expires` on. Never ends: a registry that is gone comes back.
    pub(crate) async fn keep(&mut self, mut expires: SystemTime, reporter: Reporter) {
        let mut backoff = Backoff::new(SHORTEST_WAIT, LONGEST_WAIT);
        loop {
            let mut was_lost = false;
            let due = tokio::time::sleep(refresh_after(SystemTime::now(), expires));
            tokio::select! {
                () = due => backoff.reset(),
                lost = self.lost() => {
                    was_lost = true;
                    reporter.error(&lost);
                    tokio::time::sleep(backoff.next(rand::random())).await;
                }
            }
            loop {
                match self.register().await {
                    Ok(granted) => {
                        expires = granted;
                        break;
                    }
                    Err(error) => {
                        was_lost = true;
                        reporter.error(&format!("cannot register again: {error}"));
                        tokio::time::sleep(backoff.next(rand::random())).await;
                    }
                }
            }
            reporter.registered(&self.entry, expires, Some(Again { was_lost }));
        }
    }

    /// Waits until the registry does not have the entry any more, or is gone itself.
    async fn lost(&self) -> String {
        let query = NetworkServiceEndpointQuery {
            network_service_endpoint: Some(NetworkServiceEndpoint {
                name: self.entry.name.clone(),
                ..NetworkServiceEndpoint::default()
            }),
            watch: true,
        };
        let mut endpoints = Endpoints::new(self.agent.channel.clone());
        let request = self.agent.stream_request(query);
        let reason = match endpoints.find(request).await {
            Err(status) if status.code() == Code::Unimplemented => std::future::pending().await,
            Err(status) => status.message().to_owned(),
            Ok(response) => {
                let mut entries = response.into_inner();
                loop {
                    match entries.message().await {
                        Ok(Some(entry)) if entry.deleted => {
                            break "it forgot the endpoint".to_owned();
                        }
                        Ok(Some(_)) => {}
                        Ok(None) => break "its stream ended".to_owned(),
                        Err(status) => break status.message().to_owned(),
                    }
                }
            }
        };
        format!("the registry of {} is lost: {reason}", self.agent.url)
    }

    /// Takes the endpoint out of the registry. The services stay: others may offer them.
    ///
    /// # Errors
    ///
    /// The registry refuses or gives no answer; the entry expires by itself then.
    pub(crate) async fn unregister(&self) -> Result<(), CallError> {
        let mut endpoints = Endpoints::new(self.agent.channel.clone());
        let request = self.call(self.entry.clone());
        self.agent.answer(endpoints.unregister(request)).await?;
        Ok(())
    }

    /// The entry as it stands in the registry.
    pub(crate) fn entry(&self) -> &NetworkServiceEndpoint {
        &self.entry
    }

    /// A call with the registry's path in its metadata, which begins with us.
    fn call<T>(&self, message: T) -> Request<T> {
        let mut request = self.agent.request(message);
        let token = self.agent.token().text;
        let path = serde_json::json!({ "Index": 0, "PathSegments": [{ "token": token }] });
        let path =
            AsciiMetadataValue::try_from(path.to_string()).expect("JSON of ASCII texts is ASCII");
        request.metadata_mut().insert("path", path);
        request
    }
}
