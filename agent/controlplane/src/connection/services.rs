//! The network services whose matches connections meet, and who meets them.

use std::{
    collections::{HashMap, HashSet},
    sync::{Arc, Mutex},
};

use nsm_proto::registry::NetworkService;
use tokio::task::AbortHandle;

use crate::{route::lookup::ServiceAt, sync::lock};

/// Each service with the connections that it has an endpoint for, by the ids of our segments. Cheap to clone.
#[derive(Debug, Clone, Default)]
pub(crate) struct ServiceUsers {
    services: Arc<Mutex<HashMap<Arc<ServiceAt>, Watched>>>,
}

#[derive(Debug)]
struct Watched {
    users: HashSet<String>,
    /// The service as its registry had it last.
    seen: Option<Arc<NetworkService>>,
    watch: AbortHandle,
}

impl ServiceUsers {
    /// Counts a connection in. The first one of a service starts the watch; to the others the service is given as it was seen last.
    pub(crate) fn join(
        &self,
        service: &Arc<ServiceAt>,
        id: &str,
        start: impl FnOnce(Arc<ServiceAt>) -> AbortHandle,
    ) -> Option<Arc<NetworkService>> {
        let mut services = lock(&self.services);
        let watched = services
            .entry(Arc::clone(service))
            .or_insert_with_key(|service| Watched {
                users: HashSet::new(),
                seen: None,
                watch: start(Arc::clone(service)),
            });
        watched.users.insert(id.to_owned());
        watched.seen.clone()
    }

    /// The service is as `seen` now; gives its connections.
    pub(crate) fn see(&self, service: &ServiceAt, seen: &Arc<NetworkService>) -> Vec<String> {
        let mut services = lock(&self.services);
        let Some(watched) = services.get_mut(service) else {
            return Vec::new();
        };
        watched.seen = Some(Arc::clone(seen));
        watched.users.iter().cloned().collect()
    }

    /// Counts a connection out. The watch ends with the last one.
    pub(crate) fn leave(&self, service: &ServiceAt, id: &str) {
        let mut services = lock(&self.services);
        let Some(watched) = services.get_mut(service) else {
            return;
        };
        watched.users.remove(id);
        if watched.users.is_empty() {
            watched.watch.abort();
            services.remove(service);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::route::lookup::RegistryAt;

    fn service(name: &str) -> Arc<ServiceAt> {
        Arc::new(ServiceAt {
            registry: RegistryAt::Own,
            name: name.to_owned(),
        })
    }

    #[tokio::test]
    async fn a_watch_lasts_from_the_first_user_to_the_last() {
        let users = ServiceUsers::default();
        let watch = tokio::spawn(std::future::pending::<()>());
        let handle = watch.abort_handle();
        assert_eq!(users.join(&service("a"), "one", |_| handle), None);
        let seen = Arc::new(NetworkService::default());
        assert_eq!(users.see(&service("a"), &seen), ["one"]);
        let started = |_| panic!("it is watched already");
        assert_eq!(
            users.join(&service("a"), "two", started),
            Some(seen.clone())
        );
        users.leave(&service("b"), "one");
        users.leave(&service("a"), "one");
        assert_eq!(users.see(&service("a"), &seen), ["two"]);
        assert!(!watch.is_finished());
        users.leave(&service("a"), "two");
        assert!(watch.await.expect_err("aborted").is_cancelled());
        assert!(users.see(&service("a"), &seen).is_empty());
    }
}
