//! What the registry in this process admits, for how long, and how it completes an entry.

use std::time::{Duration, SystemTime};

use nsm_core::nsm::expiry::granted_expiry;
use nsm_proto::registry::{NetworkService, NetworkServiceEndpoint};
use prost::Message;

use crate::{error::RegistryError, registry::entry::Entry};

/// What a network service carries when it does not say (NSM `setpayload`).
pub const DEFAULT_PAYLOAD: &str = "IP";

/// No limit on expiry is above this: sums of times stay far from overflow.
const EXPIRY_CEILING: Duration = Duration::from_secs(366 * 24 * 3600);

/// Bounds of one registry.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Limits {
    /// The longest time an endpoint stays without being registered again.
    pub max_expiry: Duration,
    /// How long a network service stays that no endpoint offers.
    pub service_life: Duration,
    /// How many events wait for one watcher before it is dropped.
    pub watch_depth: usize,
    /// The longest name, in bytes.
    pub name_bytes: usize,
    /// How many network services one endpoint may list.
    pub services_per_endpoint: usize,
    /// The largest entry, encoded, in bytes: bounds labels, matches and path ids.
    pub entry_bytes: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            // NSM's own bound: a dead endpoint is not offered for longer than a minute.
            max_expiry: Duration::from_secs(60),
            // NSM's registry keeps it for ever. What is registered beforehand, with its matches, must outlive a night without endpoints.
            service_life: Duration::from_secs(24 * 3600),
            // A burst of a thousand changes between two polls of a reader is not its fault.
            watch_depth: 1024,
            name_bytes: 512,
            services_per_endpoint: 256,
            entry_bytes: 64 << 10,
        }
    }
}

impl Limits {
    pub(super) fn with_ceiling(mut self) -> Self {
        self.max_expiry = self.max_expiry.min(EXPIRY_CEILING);
        self.service_life = self.service_life.min(EXPIRY_CEILING);
        self
    }

    /// What holds for entries of both kinds.
    pub(super) fn check<E: Stored>(&self, entry: &E) -> Result<(), RegistryError> {
        let (kind, name) = (E::KIND, entry.name());
        if name.is_empty() {
            return Err(RegistryError::NoName { kind });
        }
        if name.len() > self.name_bytes {
            return Err(RegistryError::NameTooLong {
                kind,
                start: name.chars().take(32).collect(),
                length: name.len(),
                limit: self.name_bytes,
            });
        }
        let size = entry.encoded_len();
        if size > self.entry_bytes {
            return Err(RegistryError::TooLarge {
                kind,
                name: name.to_owned(),
                size,
                limit: self.entry_bytes,
            });
        }
        Ok(())
    }
}

/// An entry that the registry in this process can hold.
pub trait Stored: Entry + Message {
    /// Completes an entry that asks to be registered at `now`, and gives how long it stays.
    ///
    /// # Errors
    /// The entry breaks a limit of its kind, or has expired already.
    fn admit(
        &mut self,
        limits: &Limits,
        now: SystemTime,
        bounds: &[SystemTime],
    ) -> Result<Duration, RegistryError>;

    /// Whether a registration of this entry changes nothing of `known`, so that it is no attempt on what another has registered.
    fn is_present_as(&self, known: &Self) -> bool;

    /// Takes over what outlives a registration under the same name. Called before [`Self::admit`].
    fn succeed(&mut self, known: Option<&Self>, now: SystemTime);
}

/// A new service without a payload gets [`DEFAULT_PAYLOAD`]. Who offers a service registers it, mostly by its name alone.
impl Stored for NetworkService {
    fn admit(
        &mut self,
        limits: &Limits,
        _: SystemTime,
        _: &[SystemTime],
    ) -> Result<Duration, RegistryError> {
        if self.payload.is_empty() {
            DEFAULT_PAYLOAD.clone_into(&mut self.payload);
        }
        Ok(limits.service_life)
    }

    fn is_present_as(&self, known: &Self) -> bool {
        (self.payload.is_empty() || self.payload == known.payload)
            && (self.matches.is_empty() || self.matches == known.matches)
    }

    /// A registration by the name alone leaves the payload and the matches that the service has. To take them away it is unregistered.
    fn succeed(&mut self, known: Option<&Self>, _: SystemTime) {
        let Some(known) = known else { return };
        if self.payload.is_empty() {
            self.payload.clone_from(&known.payload);
        }
        if self.matches.is_empty() {
            self.matches.clone_from(&known.matches);
        }
    }
}

/// An endpoint's expiry is the earliest of what it asks, every bound and `now` plus [`Limits::max_expiry`]. Its initial registration
/// time is that of its first registration.
impl Stored for NetworkServiceEndpoint {
    fn admit(
        &mut self,
        limits: &Limits,
        now: SystemTime,
        bounds: &[SystemTime],
    ) -> Result<Duration, RegistryError> {
        if self.network_service_names.len() > limits.services_per_endpoint {
            return Err(RegistryError::TooManyServices {
                name: self.name.clone(),
                count: self.network_service_names.len(),
                limit: limits.services_per_endpoint,
            });
        }
        let asked = self.expiration_time.map(from_timestamp);
        let expiry = granted_expiry(now, asked, bounds, limits.max_expiry);
        let life = expiry.duration_since(now).unwrap_or_default();
        if life.is_zero() {
            let earliest = bounds.iter().copied().chain(asked).min().unwrap_or(now);
            return Err(RegistryError::expired(self.name.clone(), earliest, now));
        }
        self.expiration_time = Some(expiry.into());
        Ok(life)
    }

    fn is_present_as(&self, _: &Self) -> bool {
        false
    }

    fn succeed(&mut self, known: Option<&Self>, now: SystemTime) {
        self.initial_registration_time = known
            .and_then(|known| known.initial_registration_time)
            .or(self.initial_registration_time)
            .or_else(|| Some(now.into()));
    }
}

/// A wire timestamp as a time; one out of range is the latest or the earliest that the registry keeps.
fn from_timestamp(timestamp: prost_types::Timestamp) -> SystemTime {
    let seconds = timestamp.seconds;
    SystemTime::try_from(timestamp).unwrap_or(if seconds > 0 {
        SystemTime::UNIX_EPOCH + Duration::from_secs(u64::from(u32::MAX))
    } else {
        SystemTime::UNIX_EPOCH
    })
}
