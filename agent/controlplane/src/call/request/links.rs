//! The links of a Request: what stands of the connection is changed, or goes first, and comes back where the new ones cannot stand.

use crate::{call::Calls, connection::model::Established, error::RequestError, ports::Plan};

impl Calls {
    /// Makes the plan real; a link that stood before and cannot be changed into that of the plan goes first.
    pub(super) async fn bring_up(
        &self,
        plan: &Plan,
        prior: Option<&Established>,
    ) -> Result<(), RequestError> {
        let forwarder = self.forwarder()?;
        let old = prior.and_then(|prior| prior.plan.as_deref());
        if let Some(old) = old.filter(|old| !old.keeps_its_link(plan)) {
            forwarder.down(old).await?;
        }
        let outcome = forwarder.up(plan).await;
        if let (Err(_), Some(old)) = (&outcome, old)
            && let Err(error) = forwarder.up(old).await
        {
            tracing::warn!(%error, "the links that stood before could not be restored");
        }
        Ok(outcome?)
    }
}
