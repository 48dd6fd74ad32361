//! The network services whose matches connections meet, and who meets them.

use std::{
    collections::{HashMap, HashSet},
    sync::{Arc, Mutex},
};

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
    watch: AbortHandle,
}

impl ServiceUsers {
    /// Counts a connection in. The first one of a service starts the watch.
    pub(crate) fn join(
        &self,
        service: &Arc<ServiceAt>,
        id: &str,
        start: impl FnOnce(Arc<ServiceAt>) -> AbortHandle,
    ) {
        let mut services = lock(&self.services);
        let watched = services
            .entry(Arc::clone(service))
            .or_insert_with_key(|service| Watched {
                users: HashSet::new(),
                watch: start(Arc::clone(service)),
            });
        watched.users.insert(id.to_owned());
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

    /// The connections of a service.
    pub(crate) fn of(&self, service: &ServiceAt) -> Vec<String> {
        let services = lock(&self.services);
        let users = services.get(service).map(|watched| watched.users.iter());
        users.into_iter().flatten().cloned().collect()
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
        users.join(&service("a"), "one", |_| handle);
        users.join(&service("a"), "two", |_| panic!("it is watched already"));
        users.leave(&service("b"), "one");
        users.leave(&service("a"), "one");
        assert_eq!(users.of(&service("a")), ["two"]);
        assert!(!watch.is_finished());
        users.leave(&service("a"), "two");
        assert!(watch.await.expect_err("aborted").is_cancelled());
        assert!(users.of(&service("a")).is_empty());
    }
}
