//! Bad input: a clear error with the right code, quickly, and nothing is left of it.

mod mechanisms;
mod names;
mod registries;

use nsm_proto::{
    connection::{Connection, PathSegment},
    connectioncontext::{ConnectionContext, IpContext},
    networkservice::NetworkServiceRequest,
};
use tonic::Code;

use crate::support::Client;
use crate::support::SERVICE;

/// What is wrong, the wrong Request, and the code and words of its refusal.
type Case = (
    &'static str,
    fn(&mut NetworkServiceRequest),
    Code,
    &'static [&'static str],
);

fn connection(request: &mut NetworkServiceRequest) -> &mut Connection {
    request.connection.as_mut().expect("a connection")
}

fn segments(request: &mut NetworkServiceRequest) -> &mut Vec<PathSegment> {
    let path = connection(request).path.as_mut().expect("a path");
    &mut path.path_segments
}

fn index(request: &mut NetworkServiceRequest) -> &mut u32 {
    &mut connection(request).path.as_mut().expect("a path").index
}

fn service(request: &mut NetworkServiceRequest, name: &str) {
    name.clone_into(&mut connection(request).network_service);
}

fn parameter(request: &mut NetworkServiceRequest, key: &str, value: &str) {
    let parameters = &mut request.mechanism_preferences[0].parameters;
    parameters.insert(key.to_owned(), value.to_owned());
}

fn context(request: &mut NetworkServiceRequest, ip: IpContext) {
    connection(request).context = Some(ConnectionContext {
        ip_context: Some(ip),
        ..ConnectionContext::default()
    });
}

async fn all_are_refused(client: &Client, cases: &[Case]) {
    for (what, spoil, code, words) in cases {
        let mut request = client.request_for(SERVICE);
        spoil(&mut request);
        let status = match client.send(request).await {
            Err(status) => status,
            Ok(granted) => panic!("{what}: {granted:?}"),
        };
        assert_eq!(status.code(), *code, "{what}: {status:?}");
        for word in *words {
            let message = status.message();
            assert!(message.contains(word), "{what}: `{word}` in `{message}`");
        }
    }
}
