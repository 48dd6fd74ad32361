//! `connect`: what it asks, how it keeps what it got, and how it ends.

use std::time::Duration;

use nix::sys::signal::Signal;
use nsm_proto::connection::{Connection, ConnectionEventType, State};
use tonic::Status;

use crate::support::{Call, Reply, Stage, Tool, granted, soon};

fn connect(stage: &Stage, more: &[&str]) -> Tool {
    let mut words = vec![
        "connect",
        "icmp-responder@cluster-2.example",
        "--netns",
        "/proc/self/ns/net",
        "--json",
        "--name",
        "nsc",
        "--connect-to",
        &stage.url,
    ];
    words.extend(more);
    Tool::start(&words)
}

#[tokio::test]
async fn a_connection_is_asked_for_shown_and_closed() {
    let mut stage = Stage::new([]);
    let mut tool = connect(&stage, &["--label", "app=web", "--interface", "nsm-9"]);
    let (Call::Request(request), metadata) = stage.call().await else {
        panic!("no Request")
    };
    assert!(metadata.contains_key("nsm-client-token"));
    assert!(metadata.contains_key("nsm-client-token-expires"));
    let connection = request.connection.unwrap();
    let path = connection.path.unwrap();
    assert_eq!((path.index, path.path_segments.len()), (0, 1));
    let own = &path.path_segments[0];
    assert_eq!((own.name.as_str(), &own.id), ("nsc", &connection.id));
    assert!(own.expires.is_some() && !own.token.is_empty());
    assert_eq!(connection.labels["app"], "web");
    let parameters = &request.mechanism_preferences[0].parameters;
    assert_eq!(parameters["name"], "nsm-9");
    // Who is not root passes a descriptor.
    // Whoever is not root of the node passes the namespace's descriptor.
    let named =
        ["file:///proc/", "inode://"].map(|scheme| parameters["inodeURL"].starts_with(scheme));
    assert!(named.contains(&true), "{parameters:?}");
    assert!(parameters["netnsInode"].parse::<u64>().is_ok());

    let event = tool.expect("connected").await;
    let shown = &event["connection"];
    assert_eq!(shown["id"], connection.id);
    assert_eq!(shown["mechanism"], "VXLAN");
    assert_eq!((&shown["vni"], &shown["mtu"]), (&7.into(), &1450.into()));
    assert_eq!(shown["path"], serde_json::json!(["nsc", "agent", "nse"]));
    assert_eq!(event["dns"]["answer"], "203.0.113.2:5005");
    assert!(event["setup_ms"].as_f64().unwrap() > 0.0);

    let selector = stage.monitor().await;
    assert_eq!(selector.path_segments[0].id, connection.id);
    tool.signal(Signal::SIGINT);
    let closed = stage.close().await;
    assert_eq!(closed.id, connection.id);
    assert_eq!(closed.path.unwrap().path_segments.len(), 3);
    tool.expect("closed").await;
    assert_eq!(tool.end().await, (0, String::new()));
    stage.nothing_more();
}

#[tokio::test]
async fn a_refusal_ends_it_with_the_reason() {
    let mut stage = Stage::new([Reply::Refuse(Status::not_found("no such service"))]);
    let mut tool = connect(&stage, &[]);
    stage.request().await;
    let message = tool.expect("error").await["message"].to_string();
    assert!(message.contains("no such service"), "{message}");
    let (code, error) = tool.end().await;
    assert_eq!(code, 1);
    assert!(
        error.contains("no connection to icmp-responder@cluster-2.example")
            && error.contains("NotFound")
            && error.contains("no such service"),
        "{error}"
    );
    stage.nothing_more();
}

#[tokio::test]
async fn an_agent_that_stays_silent_is_not_waited_for() {
    let mut stage = Stage::new([Reply::Silence]);
    let tool = connect(&stage, &["--timeout", "300ms"]);
    stage.request().await;
    let connection = stage.close().await;
    assert_eq!(
        connection.network_service,
        "icmp-responder@cluster-2.example"
    );
    let (code, error) = tool.end().await;
    assert_eq!(code, 1);
    assert!(error.contains("gave no answer within 300ms"), "{error}");
}

#[tokio::test]
async fn whoever_gives_up_while_it_asks_leaves_nothing() {
    // By whatever signal: the last one is that of a terminal that is closed.
    for signal in [Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP] {
        let mut stage = Stage::new([Reply::Silence]);
        let mut tool = connect(&stage, &[]);
        let asked = stage.request().await.connection.unwrap();
        tool.signal(signal);
        assert_eq!(stage.close().await.id, asked.id);
        tool.expect("closed").await;
        assert_eq!(tool.end().await.0, 0, "{signal}");
    }
}

#[tokio::test]
async fn an_answer_about_another_connection_is_refused_and_closed() {
    let mut stage = Stage::new([Reply::GrantOther]);
    let tool = connect(&stage, &[]);
    let asked = stage.request().await.connection.unwrap();
    assert_eq!(stage.close().await.id, asked.id);
    let (code, error) = tool.end().await;
    assert_eq!(code, 1);
    assert!(error.contains("answered with what cannot be"), "{error}");
}

#[tokio::test]
async fn it_refreshes_before_the_first_hop_expires() {
    let short = Reply::Grant(Duration::from_millis(900));
    let mut stage = Stage::new([short.clone(), short]);
    let mut tool = connect(&stage, &[]);
    let first = stage.request().await.connection.unwrap();
    tool.expect("connected").await;
    stage.monitor().await;
    for _ in 0..2 {
        let again = stage.request().await.connection.unwrap();
        assert_eq!(again.id, first.id);
        assert_eq!(again.path.unwrap().path_segments.len(), 3);
        tool.expect("refreshed").await;
    }
    tool.signal(Signal::SIGINT);
    stage.close().await;
    tool.expect("closed").await;
    assert_eq!(tool.end().await.0, 0);
}

#[tokio::test]
async fn a_path_that_is_down_is_closed_and_another_is_asked_for() {
    for (kind, state) in [
        (ConnectionEventType::Update, State::Down),
        (ConnectionEventType::Delete, State::Up),
    ] {
        let mut stage = Stage::new([]);
        let mut tool = connect(&stage, &[]);
        let first = granted(stage.request().await, Duration::from_secs(600));
        tool.expect("connected").await;
        stage.monitor().await;
        let mut other = first.clone();
        other.path.as_mut().unwrap().path_segments[0].id = "other".to_owned();
        stage.agent.tell(kind, &other, state);
        stage
            .agent
            .tell(ConnectionEventType::Update, &first, State::Up);
        stage.agent.tell(kind, &first, state);
        tool.expect("down").await;
        let closed = stage.close().await;
        assert_eq!(closed.id, first.id);
        assert!(closed.mechanism.is_some());
        let again = stage.request().await.connection.unwrap();
        assert_eq!(again.id, first.id);
        assert_eq!(again.state(), State::ReselectRequested);
        assert_eq!((again.mechanism, again.context), (None, None));
        assert_eq!(again.network_service_endpoint_name, "");
        assert_eq!(again.path.unwrap().path_segments.len(), 1);
        tool.expect("connected").await;
        stage.monitor().await;
        tool.signal(Signal::SIGINT);
        stage.close().await;
        assert_eq!(tool.end().await.0, 0);
    }
}

#[tokio::test]
async fn an_agent_that_was_away_is_asked_for_the_same_again() {
    let mut stage = Stage::new([
        Reply::Grant(Duration::from_secs(600)),
        Reply::Refuse(Status::unavailable("nobody is there yet")),
        Reply::Refuse(Status::failed_precondition("not that")),
    ]);
    let mut tool = connect(&stage, &[]);
    let first = stage.request().await.connection.unwrap();
    tool.expect("connected").await;
    stage.monitor().await;
    stage.agent.end_streams();
    tool.expect("down").await;
    // It is back, and those behind it may need a moment; what stands is not touched.
    for _ in 0..2 {
        let again = stage.request().await.connection.unwrap();
        assert_eq!((&again.id, again.state()), (&first.id, State::Up));
        assert_eq!(again.network_service_endpoint_name, "nse");
        assert_eq!(again.path.unwrap().path_segments.len(), 3);
        tool.expect("error").await;
    }
    // Refused: what was agreed may be gone, so that whatever endpoint there is is asked for. Packets may pass until then: nothing is closed.
    let again = stage.request().await.connection.unwrap();
    assert_eq!(again.state(), State::ReselectRequested);
    tool.expect("connected").await;
    soon("the monitor", stage.monitor()).await;
    tool.signal(Signal::SIGINT);
    stage.close().await;
    assert_eq!(tool.end().await.0, 0);
}

/// The connection as the agent tells it while an agent behind it is not heard.
fn unheard(connection: &Connection) -> Connection {
    let mut told = connection.clone();
    let metrics = &mut told.path.as_mut().unwrap().path_segments[1].metrics;
    metrics.insert("next_hop".to_owned(), "lost".to_owned());
    metrics.insert("next_hop_reason".to_owned(), "agent-2 went".to_owned());
    told
}

#[tokio::test]
async fn an_agent_on_the_way_is_waited_for() {
    let refuse = |status: fn(&'static str) -> Status| Reply::Refuse(status("not there"));
    let mut stage = Stage::new([
        Reply::Grant(Duration::from_secs(600)),
        refuse(Status::unavailable),
        refuse(Status::deadline_exceeded),
        refuse(Status::not_found),
    ]);
    let mut tool = connect(&stage, &[]);
    let first = granted(stage.request().await, Duration::from_secs(600));
    tool.expect("connected").await;
    stage.monitor().await;
    let (update, told) = (ConnectionEventType::Update, unheard(&first));
    stage.agent.tell(update, &told, State::Down);
    assert_eq!(tool.expect("down").await["reason"], "agent-2 went");
    for _ in 0..3 {
        let again = stage.request().await.connection.unwrap();
        assert_eq!((&again.id, again.state()), (&first.id, State::Up));
        assert_eq!(again.network_service_endpoint_name, "nse");
        tool.expect("error").await;
        // The same word again is no news.
        stage.agent.tell(update, &told, State::Down);
    }
    stage.request().await;
    tool.expect("connected").await;
    stage.monitor().await;
    tool.signal(Signal::SIGINT);
    stage.close().await;
    assert_eq!(tool.end().await.0, 0);
}

#[tokio::test]
async fn a_path_that_is_lost_meanwhile_is_left_without_a_close() {
    let mut stage = Stage::new([Reply::Grant(Duration::from_secs(600)), Reply::Silence]);
    let mut tool = connect(&stage, &[]);
    let first = granted(stage.request().await, Duration::from_secs(600));
    tool.expect("connected").await;
    stage.monitor().await;
    let (update, mut told) = (ConnectionEventType::Update, unheard(&first));
    stage.agent.tell(update, &told, State::Down);
    tool.expect("down").await;
    assert_eq!(stage.request().await.connection.unwrap().state(), State::Up);
    let metrics = &mut told.path.as_mut().unwrap().path_segments[1].metrics;
    metrics.insert("sbfd_state_out".to_owned(), "down".to_owned());
    metrics.insert("sbfd_reason".to_owned(), "no answer".to_owned());
    stage.agent.tell(update, &told, State::Down);
    assert_eq!(tool.expect("down").await["reason"], "no answer");
    let again = stage.request().await.connection.unwrap();
    assert_eq!(again.state(), State::ReselectRequested);
    assert_eq!(again.network_service_endpoint_name, "");
    tool.expect("connected").await;
    stage.monitor().await;
    tool.signal(Signal::SIGINT);
    stage.close().await;
    assert_eq!(tool.end().await.0, 0);
}

/// A refusal says that somebody cannot be reached, the monitor who it is.
#[tokio::test]
async fn a_refresh_in_vain_asks_the_monitor_what_is_lost() {
    let short = Duration::from_millis(900);
    let mut stage = Stage::new([
        Reply::Grant(short),
        Reply::Refuse(Status::unavailable("not there")),
    ]);
    let mut tool = connect(&stage, &[]);
    let first = granted(stage.request().await, short);
    tool.expect("connected").await;
    stage.monitor().await;
    stage.request().await;
    stage
        .agent
        .tell(ConnectionEventType::Update, &unheard(&first), State::Down);
    tool.expect("error").await;
    tool.expect("down").await;
    let again = stage.request().await.connection.unwrap();
    assert_eq!(again.state(), State::Up);
    tool.expect("connected").await;
    stage.monitor().await;
    tool.signal(Signal::SIGINT);
    stage.close().await;
    assert_eq!(tool.end().await.0, 0);
}

#[tokio::test]
async fn a_refresh_that_is_asked_for_is_made() {
    let mut stage = Stage::new([]);
    let mut tool = connect(&stage, &[]);
    let first = granted(stage.request().await, Duration::from_secs(600));
    tool.expect("connected").await;
    stage.monitor().await;
    let update = ConnectionEventType::Update;
    stage.agent.tell(update, &first, State::RefreshRequested);
    stage.request().await;
    tool.expect("refreshed").await;
    tool.signal(Signal::SIGINT);
    stage.close().await;
    assert_eq!(tool.end().await.0, 0);
}
