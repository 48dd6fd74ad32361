//! The links of a Request: what stood before goes, and comes back where the new ones cannot stand.

use crate::{call::Calls, connection::model::Established, error::RequestError, ports::Plan};

impl Calls {
    /// Makes the plan real; what stood before and cannot be changed into it goes first.
    pub(super) async fn bring_up(
        &self,
        plan: &Plan,
        prior: Option<&Established>,
    ) -> Result<(), RequestError> {
        let forwarder = self.forwarder()?;
        let replaced = prior
            .and_then(|prior| prior.plan.as_deref())
            .filter(|old| !old.is_same_links(plan));
        if let Some(old) = replaced {
            forwarder.down(old).await?;
        }
        let outcome = forwarder.up(plan).await;
        if let (Err(_), Some(old)) = (&outcome, replaced)
            && let Err(error) = forwarder.up(old).await
        {
            tracing::error!(%error, "the link that stood before could not be restored");
        }
        Ok(outcome?)
    }
}
