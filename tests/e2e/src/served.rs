//! A pair whose endpoint serves, and what its agents held before the first client.

use std::ops::Deref;

use anyhow::{Result, ensure};
use nsm_world::{Client, Cloud, Endpoint};

use crate::{Footprint, PATIENCE, Pair};

/// A pair with its endpoint; the endpoint ends before the agents do.
#[derive(Debug)]
pub struct Served {
    /// The endpoint, in the pod `endpoint`.
    pub endpoint: Endpoint,
    /// What the agents held before the first client.
    pub before: Footprint,
    /// The agents and their world.
    pub pair: Pair,
}

impl Served {
    /// As [`Pair::start`], with the endpoint.
    ///
    /// # Errors
    /// When anything of it fails.
    pub fn start(name: &str, cloud: Cloud, clients: usize) -> Result<Self> {
        Self::by(Pair::start(name, cloud, clients)?)
    }

    /// Starts the endpoint of a pair.
    ///
    /// # Errors
    /// When it does not register.
    pub fn by(pair: Pair) -> Result<Self> {
        Ok(Self {
            endpoint: pair.endpoint()?,
            before: pair.footprint()?,
            pair,
        })
    }

    /// The end of a scenario: the clients close, and the agents hold what they held before them.
    ///
    /// # Errors
    /// When a client does not end well, or as [`Pair::assert_clean`].
    pub fn close(&self, clients: impl IntoIterator<Item = Client>) -> Result<()> {
        for client in clients {
            close(&client)?;
        }
        self.assert_as_before()
    }

    /// As [`Pair::assert_clean`], of what the agents held before the first client.
    ///
    /// # Errors
    /// As there.
    pub fn assert_as_before(&self) -> Result<()> {
        self.pair.assert_clean(&self.before)
    }
}

impl Deref for Served {
    type Target = Pair;

    fn deref(&self) -> &Pair {
        &self.pair
    }
}

/// Closes a client's connection and waits for its end.
///
/// # Errors
/// When it ends with an error or not in time, with what it wrote.
pub fn close(client: &Client) -> Result<()> {
    ensure!(
        client.close(PATIENCE)?.success(),
        "the client did not end well: {}{}",
        client.process.stdout(),
        client.process.stderr()
    );
    Ok(())
}
