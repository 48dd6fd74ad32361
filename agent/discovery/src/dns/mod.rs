//! Where a domain's registry and proxy are.
//!
//! `target@X` is resolved by the first rule that applies:
//! 1. `X` is in the configured hosts: what stands there;
//! 2. `X` is `ip:port`: that address for both; `X` is an address: it with the default ports;
//! 3. SRV `registry.nsm-system.X` and `nsmgr-proxy.nsm-system.X`, target and port honoured;
//! 4. A and AAAA of `X` with the default ports, for each service that has no SRV record.
//!
//! Questions of rules 3 and 4 are asked at once (see `rules`), so a new domain costs one round trip.
//!
//! Invariants:
//! - One flight a domain: callers that come while a question is in flight share its answer. A
//!   flight is a task of its own, so that a caller that gives up does not fail the others.
//! - An answer holds for the smallest TTL of the records it was made of, at least 1 s and at most
//!   1 h; "no such domain" for at most 5 s, a server's failure for 1 s.
//! - Every answer comes within [`ResolverConfig::timeout`], whatever the servers do.
//! - Cache, flights and targets are bounded.
//!
//! /etc/hosts is not read: it cannot carry ports, and [`ResolverConfig::hosts`] can.

pub mod answer;
mod attempt;
mod cache;
mod error;
mod hosts;
mod metrics;
mod rules;
mod servers;
mod srv;
#[cfg(test)]
mod tests;
mod upstream;

use std::{
    collections::BTreeMap,
    net::SocketAddr,
    path::PathBuf,
    sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock},
    time::Duration,
};

use nsm_core::nsm::name::Domain;
use tokio::{sync::watch, time::Instant};

use self::{
    cache::{Cache, Known},
    metrics::{By, DnsMetrics},
    rules::{Found, Refusal},
    servers::Servers,
};
pub use self::{
    cache::{MAX_FLIGHTS, Outcome, Remembered},
    error::ResolveError,
    hosts::{HostEntry, HostError, HostTarget},
};

/// How domains are resolved.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ResolverConfig {
    /// The DNS servers, in the order in which they are asked; none means those of [`Self::resolv_conf`].
    pub servers: Vec<SocketAddr>,
    /// The system's resolv.conf(5), which is followed where no servers are named.
    pub resolv_conf: PathBuf,
    /// Domains that are not asked for.
    pub hosts: BTreeMap<Domain, HostEntry>,
    /// How long one resolution may take, all its questions together.
    pub timeout: Duration,
    /// The port of a registry that publishes none.
    pub registry_port: u16,
    /// The port of a proxy NSMgr that publishes none.
    pub proxy_port: u16,
    /// What stands before the domain in the registry's SRV record.
    pub registry_name: String,
    /// What stands before the domain in the proxy NSMgr's SRV record.
    pub proxy_name: String,
}

impl Default for ResolverConfig {
    fn default() -> Self {
        Self {
            servers: Vec::new(),
            resolv_conf: "/etc/resolv.conf".into(),
            hosts: BTreeMap::new(),
            // Below the 5 s that NSM gives a dial: the caller still gets the cause.
            timeout: Duration::from_secs(2),
            registry_port: 5005,
            proxy_port: 5006,
            registry_name: "registry.nsm-system".to_owned(),
            proxy_name: "nsmgr-proxy.nsm-system".to_owned(),
        }
    }
}

/// Where a domain's services are, and how that is known.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Resolved {
    /// Addresses of the registry, in the order in which to try them.
    pub registry: Vec<SocketAddr>,
    /// Addresses of the proxy NSMgr, in the order in which to try them; none when the domain
    /// publishes a registry only.
    pub proxy: Vec<SocketAddr>,
    /// The question that decided, for people: `SRV registry.nsm-system.cluster-2.example`.
    pub question: String,
    /// The answer, for people.
    pub answer: String,
    /// The answering server: a DNS server, or a phrase for what stands in for one.
    pub server: String,
    /// The answer was remembered.
    pub cached: bool,
    /// Until when the answer holds.
    pub expires: Instant,
}

/// Resolves domains; clones share the cache.
#[derive(Clone)]
pub struct Resolver {
    setup: Arc<RwLock<Arc<Setup>>>,
    metrics: DnsMetrics,
}

/// A configuration with its servers and its cache: a reload starts a new one, so that no answer of
/// the former configuration outlives it.
struct Setup {
    config: ResolverConfig,
    servers: Servers,
    cache: Mutex<Cache>,
}

impl Resolver {
    /// How old an answer must be to be doubted ([`Resolver::again`]): a domain that is away is not asked for at every call.
    pub const AGE_OF_DOUBT: Duration = Duration::from_secs(1);

    /// Makes a resolver. Reads the system's resolv.conf when the configuration names no servers; as long as
    /// that fails, domains that need a question fail with the reason and all others resolve.
    #[must_use]
    pub fn new(config: ResolverConfig) -> Self {
        Self {
            setup: Arc::new(RwLock::new(Arc::new(Setup::new(config)))),
            metrics: DnsMetrics::default(),
        }
    }

    /// Puts what this resolver counts into a metrics registry.
    pub fn register_metrics(&self, registry: &mut prometheus_client::registry::Registry) {
        self.metrics.register(registry);
    }

    /// Takes another configuration. What is in flight still answers its callers; nothing that was
    /// remembered is used again.
    pub fn reload(&self, config: ResolverConfig) {
        let setup = Arc::new(Setup::new(config));
        *self.setup.write().unwrap_or_else(PoisonError::into_inner) = setup;
    }

    /// The answers that are remembered, also those that are refusals, ordered by domain.
    #[must_use]
    pub fn remembered(&self) -> Vec<Remembered> {
        self.setup().cache().remembered(Instant::now())
    }

    /// Resolves a domain within [`ResolverConfig::timeout`]. Must be called in a tokio runtime.
    ///
    /// # Errors
    ///
    /// The domain does not exist or has no address, or no server answered.
    pub async fn resolve(&self, domain: &Domain) -> Result<Arc<Resolved>, ResolveError> {
        self.resolve_holding(domain, ()).await
    }

    /// The same; `held` is dropped when the question is answered that is asked for this caller, which may be after the caller has given
    /// up. That bounds the questions that one caller starts.
    ///
    /// # Errors
    ///
    /// As for [`Self::resolve`].
    pub async fn resolve_holding(
        &self,
        domain: &Domain,
        held: impl Send + 'static,
    ) -> Result<Arc<Resolved>, ResolveError> {
        let setup = self.setup();
        let now = Instant::now();
        if let Some(found) = rules::known(&setup.config, domain) {
            self.metrics.looked_up(By::Configuration);
            return Ok(Arc::new(Resolved::new(found, now)));
        }
        let known = setup.cache().look_up(domain, now);
        let flight = match known {
            Known::Answer(outcome) => {
                self.metrics.looked_up(By::Cache);
                return outcome;
            }
            Known::InFlight(flight) => {
                self.metrics.looked_up(By::Flight);
                flight
            }
            Known::Unknown(sender, flight) => {
                self.metrics.looked_up(By::Question);
                let question = setup.fly(domain.clone(), sender, self.metrics.clone());
                tokio::spawn(async move {
                    question.await;
                    drop(held);
                });
                flight
            }
            Known::Full => {
                self.metrics.looked_up(By::Refusal);
                return Err(ResolveError::Busy {
                    domain: domain.to_string(),
                    limit: MAX_FLIGHTS,
                });
            }
        };
        land(flight).await.unwrap_or_else(|| {
            Err(ResolveError::Interrupted {
                domain: domain.to_string(),
            })
        })
    }

    /// Resolves a domain again whose remembered answer is of no use: where it led cannot be reached. `None` where the answer is the
    /// same, or was given within [`Resolver::AGE_OF_DOUBT`]. For `held` see [`Self::resolve_holding`].
    ///
    /// Where no server answers the remembered answer stays: the network may be away as a whole.
    pub async fn again(
        &self,
        domain: &Domain,
        stale: &Resolved,
        held: impl Send + 'static,
    ) -> Option<Arc<Resolved>> {
        if !stale.cached {
            return None;
        }
        let setup = self.setup();
        let forgotten = setup.cache().doubt(domain, stale, Instant::now());
        let answered = self.resolve_holding(domain, held).await;
        let fresh = match (answered, forgotten) {
            (Ok(fresh), _) => fresh,
            (Err(error), Some(forgotten)) if error.is_passing() => {
                setup.cache().restore(domain, forgotten);
                return None;
            }
            (Err(_), _) => return None,
        };
        let is_other = fresh.registry != stale.registry || fresh.proxy != stale.proxy;
        is_other.then_some(fresh)
    }

    fn setup(&self) -> Arc<Setup> {
        Arc::clone(&self.setup.read().unwrap_or_else(PoisonError::into_inner))
    }
}

impl Setup {
    fn new(config: ResolverConfig) -> Self {
        Self {
            servers: Servers::new(&config.servers, &config.resolv_conf, config.timeout),
            config,
            cache: Mutex::new(Cache::default()),
        }
    }

    fn cache(&self) -> MutexGuard<'_, Cache> {
        // The cache holds no invariant across calls that a panic could break.
        self.cache.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Asks for a domain, keeps the outcome and passes it to all callers that wait.
    async fn fly(
        self: Arc<Self>,
        domain: Domain,
        waiting: watch::Sender<Option<Outcome>>,
        metrics: DnsMetrics,
    ) {
        let started = Instant::now();
        let answer = rules::ask(&self.config, &self.servers.now(), &domain).await;
        let now = Instant::now();
        let (fresh, kept, expires) = match answer {
            Ok(found) => {
                let resolved = Resolved::new(found, now);
                tracing::debug!(
                    domain = %domain,
                    dns.question = %resolved.question,
                    dns.answer = %resolved.answer,
                    dns.server = %resolved.server,
                    "domain resolved"
                );
                let expires = resolved.expires;
                let remembered = Resolved {
                    cached: true,
                    ..resolved.clone()
                };
                (Ok(Arc::new(resolved)), Ok(Arc::new(remembered)), expires)
            }
            Err(Refusal { error, ttl }) => {
                tracing::debug!(domain = %domain, %error, "domain not resolved");
                (Err(error.clone()), Err(error), now + ttl)
            }
        };
        metrics.asked(&fresh, now - started);
        self.cache().land(domain, kept, expires, now);
        // Nobody may wait any more; the answer is remembered all the same.
        waiting.send_replace(Some(fresh));
    }
}

impl Resolver {
    /// Whether the operator has configured where this domain is.
    #[must_use]
    pub fn is_configured(&self, domain: &Domain) -> bool {
        let setup = self.setup.read().unwrap_or_else(PoisonError::into_inner);
        setup.config.hosts.contains_key(domain)
    }
}

impl Resolved {
    fn new(found: Found, now: Instant) -> Self {
        Self {
            answer: found.answer(),
            registry: found.registry,
            proxy: found.proxy,
            question: found.question,
            server: found.server,
            cached: false,
            expires: now + found.ttl,
        }
    }
}

/// Waits for a flight; none when it was given up.
async fn land(mut flight: watch::Receiver<Option<Outcome>>) -> Option<Outcome> {
    flight.wait_for(Option::is_some).await.ok()?.clone()
}
