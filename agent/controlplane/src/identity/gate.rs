//! Proofs and permissions of callers and servers that have shown a certificate.
//!
//! The decisions are those of [`nsm_core::identity::chain`] and [`nsm_core::identity::access`]; here are the rules as they are now, the
//! count of what they refused, and a line of the log a minute for each. Who has shown no certificate does not come here.

use std::{
    collections::BTreeMap,
    fmt,
    sync::{Arc, Mutex, PoisonError, RwLock},
    time::SystemTime,
};

use nsm_core::{
    identity::{
        SpiffeId, TrustDomain, Workload,
        access::{Access, Ask, BadRules, Denied, Role, Rules, Server},
        chain::{Certified, Check, LONGEST_LIFE, Proved, TokensRefused, check_answer, check_call},
        es256::P256Key,
    },
    nsm::name::Domain,
};
use prometheus_client::{
    encoding::EncodeLabelSet,
    metrics::{counter::Counter, family::Family},
    registry::Registry,
};
use tokio::sync::watch;

use super::es256::Verifier;
use crate::{occasional::Occasional, sync::lock};

/// The ids of one transport connection, by the certificates that both ends have shown on it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Shown {
    /// The other end's.
    pub peer: SpiffeId,
    /// The key in its certificate; none where it is of another kind than tokens are signed with.
    pub key: Option<P256Key>,
    /// Ours.
    pub own: SpiffeId,
}

/// Who asks on a path whose tokens are proved.
#[derive(Debug, Clone)]
pub(crate) struct Guest {
    /// What the caller has shown.
    pub(crate) shown: Arc<Shown>,
    /// The id of the path's first segment.
    pub(crate) first: SpiffeId,
}

impl Shown {
    fn certified(&self) -> Certified<'_> {
        Certified {
            id: &self.peer,
            key: self.key.as_ref(),
        }
    }
}

/// Decides on calls and answers whose other end has shown a certificate. Cheap to share.
pub struct Gate {
    domain: Domain,
    rules: RwLock<Current>,
    verifier: Verifier,
    refusals: Refusals,
    /// Moves with each change of the rules.
    changes: watch::Sender<()>,
}

/// The rules, and what they come to for our trust domain. Ours is known with our first certificate.
struct Current {
    rules: Rules,
    access: Option<Arc<Access>>,
}

impl Current {
    fn access_of(&self, own: &TrustDomain) -> Option<Arc<Access>> {
        let known = self.access.as_ref();
        known.filter(|known| known.trust_domain() == own).cloned()
    }
}

impl Gate {
    /// The gate of an agent of `domain`.
    ///
    /// # Errors
    /// The rules contradict each other.
    pub fn new(domain: Domain, rules: Rules) -> Result<Self, BadRules> {
        rules.check(&domain)?;
        Ok(Self {
            domain,
            rules: RwLock::new(Current {
                rules,
                access: None,
            }),
            verifier: Verifier::default(),
            refusals: Refusals::default(),
            changes: watch::Sender::new(()),
        })
    }

    /// The gate of an agent that has to do with no other domain.
    #[must_use]
    pub fn of_own_domain(domain: Domain) -> Self {
        Self::new(domain, Rules::default()).expect("no rules contradict each other")
    }

    /// Takes other rules. Calls at work go on with those they began with.
    ///
    /// # Errors
    /// The rules contradict each other; the old ones stay.
    pub fn set_rules(&self, rules: Rules) -> Result<(), BadRules> {
        rules.check(&self.domain)?;
        let mut current = self.rules.write().unwrap_or_else(PoisonError::into_inner);
        *current = Current {
            rules,
            access: None,
        };
        drop(current);
        self.changes.send_replace(());
        Ok(())
    }

    /// Returns when the rules have changed and `holds` does not hold any more. Cancelled with the stream that it ends.
    pub(crate) fn until_not(
        self: Arc<Self>,
        holds: impl Fn(&Self) -> bool + Send + 'static,
    ) -> impl Future<Output = ()> + Send + 'static {
        let mut changes = self.changes.subscribe();
        async move {
            while changes.changed().await.is_ok() {
                if !holds(&self) {
                    return;
                }
            }
        }
    }

    /// The rules for an agent of a trust domain.
    fn access(&self, own: &TrustDomain) -> Arc<Access> {
        let current = self.rules.read().unwrap_or_else(PoisonError::into_inner);
        if let Some(known) = current.access_of(own) {
            return known;
        }
        drop(current);
        let mut current = self.rules.write().unwrap_or_else(PoisonError::into_inner);
        if let Some(known) = current.access_of(own) {
            return known;
        }
        let access = Access::new(self.domain.clone(), own.clone(), current.rules.clone());
        let access = Arc::new(access.expect("the rules were checked when they came"));
        current.access = Some(Arc::clone(&access));
        access
    }

    fn of(&self, shown: &Shown) -> Arc<Access> {
        self.access(shown.own.trust_domain())
    }

    fn check(&self) -> Check<'_> {
        Check {
            now: SystemTime::now(),
            longest: LONGEST_LIFE,
            es256: &self.verifier,
        }
    }

    /// Checks the tokens of a call: those of the path's segments up to the caller's.
    ///
    /// # Errors
    /// The rule that refuses them.
    pub(crate) fn prove_call(
        &self,
        shown: &Shown,
        tokens: &[&str],
    ) -> Result<Proved, TokensRefused> {
        let proved = check_call(tokens, shown.certified(), &shown.own, self.check());
        proved.inspect_err(|refusal| self.refusals.of_tokens(shown, refusal))
    }

    /// Checks the tokens of an answer: those of all segments. `own` is the index of ours.
    ///
    /// # Errors
    /// The rule that refuses them.
    pub(crate) fn prove_answer(
        &self,
        shown: &Shown,
        tokens: &[&str],
        own: usize,
    ) -> Result<Proved, TokensRefused> {
        let proved = check_answer(tokens, own, shown.certified(), self.check());
        proved.inspect_err(|refusal| self.refusals.of_tokens(shown, refusal))
    }

    /// Decides a call over the network.
    ///
    /// # Errors
    /// The rule that denies it.
    pub(crate) fn admit(&self, shown: &Shown, ask: Ask<'_>) -> Result<(), Denied> {
        let decided = self.of(shown).check_caller(&shown.peer, ask);
        self.counted(decided)
    }

    /// Decides a call over a socket of this node. `domain` is that of another domain's name.
    ///
    /// # Errors
    /// The rule that denies it.
    pub(crate) fn admit_on_node(
        &self,
        shown: &Shown,
        domain: Option<&Domain>,
    ) -> Result<(), Denied> {
        let decided = self.of(shown).check_on_node(&shown.peer, domain);
        self.counted(decided)
    }

    /// Decides whether a server is who it should be.
    ///
    /// # Errors
    /// The rule that denies it.
    pub(crate) fn admit_server(
        &self,
        shown: &Shown,
        server: Server<'_>,
        role: Role,
    ) -> Result<(), Denied> {
        let decided = self.of(shown).check_server(&shown.peer, server, role);
        self.counted(decided)
    }

    /// Whether the caller sees a network service of ours.
    pub(crate) fn sees(&self, shown: &Shown, service: &str) -> bool {
        self.of(shown).sees(&shown.peer, service)
    }

    /// Whether the other end is of our own trust domain.
    pub(crate) fn is_own(&self, shown: &Shown) -> bool {
        shown.peer.trust_domain() == shown.own.trust_domain()
    }

    /// As whom a caller's proofs make it the owner of a connection's id that is bound to one; none where it is another's. A role that was
    /// given meanwhile takes nothing from whoever made the id; one that was taken does.
    pub(crate) fn owner_of(&self, guest: &Guest, id: u128) -> Option<Workload> {
        let Guest { shown, first } = guest;
        let as_itself = Workload::of_id(&shown.peer, first);
        let owners = [self.workload(shown, first), as_itself];
        owners.into_iter().find(|owner| owner.owns(id))
    }

    /// Whose the things are that the caller makes on a path that `first` has begun.
    pub(crate) fn workload(&self, shown: &Shown, first: &SpiffeId) -> Workload {
        self.of(shown).workload(&shown.peer, first)
    }

    fn counted(&self, decided: Result<(), Denied>) -> Result<(), Denied> {
        decided.inspect_err(|denied| self.refusals.of_policy(denied))
    }

    /// Adds what was refused to a metrics registry.
    pub(crate) fn register_metrics(&self, registry: &mut Registry) {
        registry.register(
            "identity_refusals",
            "Calls and answers that the tokens or the policy refused, by rule",
            self.refusals.counts.clone(),
        );
    }
}

impl fmt::Debug for Gate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Gate")
            .field("domain", &self.domain)
            .finish_non_exhaustive()
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ByRule {
    rule: &'static str,
}

/// What was refused, by rule.
#[derive(Debug, Default)]
struct Refusals {
    counts: Family<ByRule, Counter>,
    lines: Mutex<BTreeMap<&'static str, Occasional>>,
}

impl Refusals {
    fn of_tokens(&self, shown: &Shown, refusal: &TokensRefused) {
        if self.is_due(refusal.rule()) {
            tracing::warn!(rule = refusal.rule(), peer.id = %shown.peer, %refusal, "refused the tokens of a path; others within a minute are not logged");
        }
    }

    fn of_policy(&self, denied: &Denied) {
        if self.is_due(denied.rule()) {
            tracing::warn!(rule = denied.rule(), %denied, "the policy refused; others within a minute are not logged");
        }
    }

    /// Counts; whether the rule's line is due. The rules are few, each with a constant name.
    fn is_due(&self, rule: &'static str) -> bool {
        self.counts.get_or_create(&ByRule { rule }).inc();
        lock(&self.lines).entry(rule).or_default().is_due()
    }
}
