//! Connections between two pods of this node: two pod links, each of which leads into the other pod.

use std::{sync::Arc, time::Instant};

use nsm_core::link::{LinkAlias, PodLinkSpec};

use super::{
    ForwardError, Forwarding, ends_of,
    joined::{Connection, Joint, To, Written},
};
use crate::{bpf::PairedEnd, links::PodLink, netns::Netns};

impl Forwarding {
    /// Makes a connection between two pods of this node as wanted. What is there of it is changed in place: the client's link stays when
    /// the connection went through a tunnel before, or to another endpoint. The alias of the endpoint's link is that of the client's for the
    /// endpoint ([`LinkAlias::of_endpoint`]).
    ///
    /// # Errors
    ///
    /// See [`ForwardError`]. Links that this call made are removed, and a connection that was there before is joined as before.
    pub async fn up_pair(
        &self,
        client: (&Netns, &PodLinkSpec),
        endpoint: (&Netns, &PodLinkSpec),
    ) -> Result<[PodLink; 2], ForwardError> {
        let (devices, since) = (Arc::clone(&self.devices), Instant::now());
        self.links
            .on_node_of(move |_| devices.ensure_fence())
            .await?;
        let (near, far) = tokio::join!(
            self.links.up_pod_link(client.0, &client.1.link),
            self.links.up_pod_link(endpoint.0, &endpoint.1.link),
        );
        let aliases = [&client.1.link.alias, &endpoint.1.link.alias];
        let outcome = match (&near, &far) {
            (Ok(near), Ok(far)) => {
                self.join_pair([near, far], [client.1, endpoint.1], since)
                    .await
            }
            _ => Ok(()),
        };
        let (near, far, error) = match (near, far, outcome) {
            (Ok(near), Ok(far), Ok(())) => return Ok([near, far]),
            (Ok(near), Ok(far), Err(error)) => (Some(near), Some(far), error),
            (Err(error), far, _) => (None, far.ok(), error.into()),
            (near, Err(error), _) => (near.ok(), None, error.into()),
        };
        self.take_back(aliases, [near, far]).await?;
        Err(error)
    }

    /// Removes those links of a pair that were made just now.
    async fn take_back(
        &self,
        aliases: [&LinkAlias; 2],
        links: [Option<PodLink>; 2],
    ) -> Result<(), ForwardError> {
        let made = links.map(|link| link.is_some_and(|link| link.pod.created));
        if made[0] {
            self.disconnect(aliases[0])?;
        }
        let made = aliases.into_iter().zip(made).filter(|(_, made)| *made);
        let made: Vec<LinkAlias> = made.map(|(alias, _)| alias.clone()).collect();
        self.links.down_pod_links(&made).await?;
        Ok(())
    }

    /// Puts the program on both links, then joins them in the maps. Nothing is done where nothing has changed.
    async fn join_pair(
        &self,
        links: [&PodLink; 2],
        specs: [&PodLinkSpec; 2],
        since: Instant,
    ) -> Result<(), ForwardError> {
        let alias = &specs[0].link.alias;
        let ends = links.map(ends_of);
        let written = Written::pair(&ends, specs);
        let is_same = |known: &Connection| known.written.as_ref() == Some(&written);
        if self.joined().get(alias).is_some_and(is_same) {
            return Ok(());
        }
        let nodes = ends.map(|end| end.node);
        self.hook(nodes).await?;
        let paired = |at: usize| PairedEnd {
            ends: ends[at],
            sources: &specs[at].sources,
        };
        let slots = self.bpf().connect_pair([paired(0), paired(1)])?;
        let joint = |at: usize| Joint {
            node: nodes[at],
            slot: slots[at],
        };
        let connection = Connection {
            link: joint(0),
            to: To::Link(joint(1)),
            written: Some(written),
        };
        self.note(alias, connection, links, since)?;
        self.joined().was_halved(alias);
        Ok(())
    }
}
