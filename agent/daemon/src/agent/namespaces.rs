//! The namespaces of pods: opened for one call, since a handle keeps the namespace of a pod that is
//! gone.
//!
//! One that came as a descriptor may be out of our sight otherwise: an agent in a container without
//! the host's processes finds no pod by its inode. Such a namespace is kept as long as its
//! connection has links in it, or they could never be taken away.

use std::{
    collections::HashMap,
    os::fd::AsFd as _,
    sync::{Mutex, MutexGuard, PoisonError},
};

use nsm_controlplane::ports::PodNetns;
use nsm_core::{link::LinkAlias, net::NetnsUrl};
use nsm_dataplane::netns::{Netns, NetnsError};

#[derive(Debug, Default)]
pub(super) struct Namespaces {
    /// By link: where it is, as its owner writes it, and the namespace.
    kept: Mutex<HashMap<LinkAlias, (NetnsUrl, Netns)>>,
}

impl Namespaces {
    /// Opens the namespace of a link.
    pub(super) async fn open(
        &self,
        pod: &PodNetns,
        alias: &LinkAlias,
    ) -> Result<Netns, NetnsError> {
        if let Some(descriptor) = &pod.descriptor {
            return Netns::from_fd(descriptor.as_fd());
        }
        let kept = self.kept().get(alias).cloned();
        match kept.filter(|(url, _)| *url == pod.url) {
            Some((_, netns)) => Ok(netns),
            None => find(&pod.url).await,
        }
    }

    /// Opens a namespace in which there may be a link.
    pub(super) async fn find(&self, url: &NetnsUrl) -> Result<Netns, NetnsError> {
        let kept = {
            let kept = self.kept();
            let mut places = kept.values();
            let found = places.find(|(place, _)| place == url);
            found.map(|(_, netns)| netns.clone())
        };
        match kept {
            Some(netns) => Ok(netns),
            None => find(url).await,
        }
    }

    /// Whether something else than the descriptor that was passed leads there.
    pub(super) async fn is_in_sight(&self, pod: &PodNetns) -> bool {
        pod.descriptor.is_none() || find(&pod.url).await.is_ok()
    }

    /// A link stands there now. Keeps the namespace where nothing but its descriptor leads there, and that of the place where the link was
    /// before no longer.
    pub(super) fn linked(
        &self,
        pod: &PodNetns,
        alias: &LinkAlias,
        netns: Netns,
        is_in_sight: bool,
    ) {
        let mut kept = self.kept();
        if !is_in_sight {
            kept.insert(alias.clone(), (pod.url.clone(), netns));
        } else if kept.get(alias).is_some_and(|(url, _)| *url != pod.url) {
            kept.remove(alias);
        }
    }

    /// The link is gone.
    pub(super) fn unlinked(&self, alias: &LinkAlias) {
        self.kept().remove(alias);
    }

    fn kept(&self) -> MutexGuard<'_, HashMap<LinkAlias, (NetnsUrl, Netns)>> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Opens a namespace by path at once; by inode it may take a walk through /proc.
async fn find(url: &NetnsUrl) -> Result<Netns, NetnsError> {
    match url {
        NetnsUrl::File(_) => Netns::from_url(url),
        NetnsUrl::Inode { .. } => {
            let url = url.clone();
            tokio::task::spawn_blocking(move || Netns::from_url(&url))
                .await
                .expect("looking for a namespace does not panic")
        }
    }
}
