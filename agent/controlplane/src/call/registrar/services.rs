//! Calls about network services. What they share with those about endpoints is in the module above.

use nsm_proto::registry::{
    NetworkService, NetworkServiceQuery,
    network_service_registry_client::NetworkServiceRegistryClient,
};
use tokio_stream::StreamExt as _;
use tonic::Status;

use super::{Registrar, Target, find, join};
use crate::{
    call::Call,
    peer::peers::call,
    registry::{grpc::ServiceStream, path_header::PathHeader},
};

impl Registrar {
    /// Registers a network service.
    pub(crate) async fn register_service(
        &self,
        call_: Call<NetworkService>,
        path: Option<PathHeader>,
    ) -> Result<NetworkService, Status> {
        let mut service = call_.message;
        let place = self
            .address([service.name.as_str()], call_.deadline)
            .await?;
        place.strip(&mut service.name)?;
        let mut registered = match &place.target {
            Target::Here(registry) => registry.register_service(service)?,
            Target::At { url, channel } => {
                let request = self.outgoing(service, call_.deadline, path);
                let mut client = NetworkServiceRegistryClient::new(channel.clone());
                let answer = client.register(request);
                call(url, "Register", call_.deadline, answer)
                    .await?
                    .into_inner()
            }
        };
        place.join(&mut registered.name);
        Ok(registered)
    }

    /// Takes a network service out.
    pub(crate) async fn unregister_service(
        &self,
        call_: Call<NetworkService>,
        path: Option<PathHeader>,
    ) -> Result<(), Status> {
        let mut service = call_.message;
        let place = self
            .address([service.name.as_str()], call_.deadline)
            .await?;
        place.strip(&mut service.name)?;
        match &place.target {
            Target::Here(registry) => {
                registry.unregister_service(&service.name);
            }
            Target::At { url, channel } => {
                let request = self.outgoing(service, call_.deadline, path);
                let mut client = NetworkServiceRegistryClient::new(channel.clone());
                call(
                    url,
                    "Unregister",
                    call_.deadline,
                    client.unregister(request),
                )
                .await?;
            }
        }
        Ok(())
    }

    /// Finds network services, or watches them.
    pub(crate) async fn find_services(
        &self,
        call_: Call<NetworkServiceQuery>,
    ) -> Result<ServiceStream, Status> {
        let mut query = call_.message;
        let wanted = query.network_service.get_or_insert_default();
        let place = self.address([wanted.name.as_str()], call_.deadline).await?;
        place.strip(&mut wanted.name)?;
        let found: ServiceStream = match &place.target {
            Target::Here(registry) => registry.service_stream(query)?,
            Target::At { url, channel } => {
                let watch = query.watch;
                let bound = Some(call_.deadline).filter(|_| !watch);
                let request = self.lookup.peers.outgoing(query, bound);
                let mut client = NetworkServiceRegistryClient::new(channel.clone());
                let answer = async move { client.find(request).await };
                let end = self.drained();
                find(url, watch, call_.deadline, answer, end).await?
            }
        };
        let domain = place.domain;
        Ok(Box::pin(found.map(move |answer| {
            let mut answer = answer?;
            if let Some(service) = &mut answer.network_service {
                join(domain.as_ref(), &mut service.name);
            }
            Ok(answer)
        })))
    }
}
