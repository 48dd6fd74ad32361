use std::time::{Duration, SystemTime};

use nsm_core::identity::share::Limit;
use nsm_proto::connection::{Path, PathSegment, State};
use tokio::time::Instant;
use tokio_stream::StreamExt as _;

use super::{backlog::BACKLOG, *};
use crate::{
    connection::{
        model::{Established, PathState},
        store::Claim,
    },
    places::Limits,
    route::next::Route,
};

fn established(number: usize, labels: usize) -> Arc<Established> {
    let segment = |name: &str| PathSegment {
        name: name.to_owned(),
        id: format!("{name}-{number}"),
        ..PathSegment::default()
    };
    Arc::new(Established {
        view: Connection {
            id: format!("agent-{number}"),
            labels: [("text".to_owned(), "x".repeat(labels))].into(),
            path: Some(Path {
                index: 1,
                path_segments: vec![segment("client"), segment("agent")],
            }),
            ..Connection::default()
        },
        owner: Owner::Nsmgr,
        shown: None,
        arrival: crate::route::router::Arrival::Local,
        route: Route::example("tcp://192.0.2.1:5006"),
        next_mechanism: None,
        plan: None,
        key: None,
        expires: SystemTime::UNIX_EPOCH,
        committed: Instant::now(),
        path: PathState::default(),
    })
}

/// Monitors of connections that stand.
async fn standing(connections: &[Arc<Established>]) -> Monitors {
    standing_in(&Budget::new(&Limits::wide()), connections).await
}

async fn standing_in(budget: &Budget, connections: &[Arc<Established>]) -> Monitors {
    let monitors = Monitors::of(Connections::new(budget), budget);
    for established in connections {
        set(&monitors, established, Some(Arc::clone(established))).await;
    }
    monitors
}

async fn set(monitors: &Monitors, which: &Established, to: Option<Arc<Established>>) {
    let claim = Claim {
        holder: Holder::our_own(),
        bytes: 0,
        deadline: Instant::now() + Duration::from_secs(60),
    };
    let turn = monitors.connections.admit(&which.view.id, claim).await;
    turn.expect("nobody else is at work").set(to);
}

fn follow(monitors: &Monitors, skips_answered: bool) -> Events {
    let selector = MonitorScopeSelector {
        path_segments: vec![PathSegment {
            name: "client".to_owned(),
            ..PathSegment::default()
        }],
        network_services: Vec::new(),
    };
    let reader = Reader {
        owner: Owner::Nsmgr,
        holder: Holder::our_own(),
        skips_answered,
    };
    monitors.subscribe(reader, selector).expect("a place")
}

/// The events until the stream ends.
async fn rest(monitors: &Monitors, events: Events) -> Vec<ConnectionEvent> {
    monitors.end_all();
    let events: Vec<_> = events.collect().await;
    events
        .into_iter()
        .map(|event| event.expect("an event"))
        .collect()
}

fn kinds(events: &[ConnectionEvent]) -> Vec<ConnectionEventType> {
    events.iter().map(ConnectionEvent::r#type).collect()
}

#[tokio::test]
async fn many_connections_are_told_in_events_that_can_be_read() {
    use ConnectionEventType::{InitialStateTransfer, Update};
    let mut connections: Vec<_> = (0..200).map(|number| established(number, 2000)).collect();
    // One alone is larger than what one event may carry.
    connections.insert(100, established(1000, 2 * TOGETHER));
    let monitors = standing(&connections).await;
    let mut events = follow(&monitors, false);
    let ids: Vec<_> = connections.iter().map(|it| it.view.id.clone()).collect();
    let mut all = Vec::new();
    let mut count = 0;
    while count < 2 * connections.len() {
        if count == connections.len() {
            monitors.publish_all(&ids);
        }
        let event = events.next().await.expect("more").expect("an event");
        count += event.connections.len();
        all.push(event);
    }
    assert_eq!(rest(&monitors, events).await, []);
    let kinds = kinds(&all);
    assert_eq!(kinds[0], InitialStateTransfer);
    assert!(kinds[1..].iter().all(|kind| *kind == Update));
    assert!(all.len() < 40, "{}", all.len());
    for event in all {
        let size = event.encoded_len();
        assert!(size < TOGETHER * 3 / 2 || event.connections.len() == 1);
    }
}

/// A reader that reads nothing for a while gets each connection once, as it is when it is read.
#[tokio::test]
async fn a_slow_reader_is_not_cut_off_by_changes() {
    // Each in an event of its own, of which there are more than may wait.
    let before: Vec<_> = (0..1100)
        .map(|number| established(number, TOGETHER / 2))
        .collect();
    let monitors = standing(&before).await;
    let mut events = follow(&monitors, false);
    let first = events.next().await.expect("more").expect("an event");
    let ids: Vec<_> = before.iter().map(|it| it.view.id.clone()).collect();
    for _ in 0..5 {
        monitors.publish_all(&ids);
    }
    for changed in &before {
        let mut now = (**changed).clone();
        now.view.set_state(State::Down);
        set(&monitors, changed, Some(Arc::new(now))).await;
    }
    monitors.publish_all(&ids);
    let told = rest(&monitors, events).await;
    assert_eq!((first.connections.len(), told.len()), (1, before.len()));
    let told: Vec<_> = told.into_iter().flat_map(|it| it.connections).collect();
    assert!(told.iter().all(|(_, it)| it.state() == State::Down));
    let told: BTreeSet<_> = told.into_iter().map(|(id, _)| id).collect();
    assert_eq!(told.len(), before.len());
}

/// A hop that gets no events of its own Requests does not get their outdated state later.
#[tokio::test]
async fn what_stood_at_first_is_told_as_it_is_when_it_is_read() {
    let before: Vec<_> = (0..3).map(|number| established(number, TOGETHER)).collect();
    let monitors = standing(&before).await;
    let mut events = follow(&monitors, true);
    let first = events.next().await.expect("more").expect("an event");
    let (first, _) = first.connections.first_key_value().expect("one");
    let left: Vec<_> = before.iter().filter(|it| it.view.id != *first).collect();
    let mut now = (**left[0]).clone();
    now.view.set_state(State::Down);
    let now = Arc::new(now);
    set(&monitors, left[0], Some(Arc::clone(&now))).await;
    monitors.publish_answered(ConnectionEventType::Update, &now);
    set(&monitors, left[1], None).await;
    monitors.publish_answered(ConnectionEventType::Delete, left[1]);
    let told = rest(&monitors, events).await;
    assert_eq!(kinds(&told), [ConnectionEventType::Update]);
    let only = (now.view.id.clone(), now.view.clone());
    assert_eq!(told[0].connections, [only].into());
}

/// Its DELETE has been published, or will be.
#[tokio::test]
async fn a_connection_that_has_gone_is_not_told_to_stand() {
    use ConnectionEventType::{Delete, Update};
    let (gone, changed) = (established(1, 0), established(2, 0));
    let monitors = standing(&[Arc::clone(&gone), Arc::clone(&changed)]).await;
    let mut events = follow(&monitors, false);
    let first = events.next().await.expect("one").expect("an event");
    assert_eq!(first.connections.len(), 2);
    monitors.publish(Update, &gone);
    set(&monitors, &gone, None).await;
    monitors.publish(Delete, &gone);
    let now = established(2, 7);
    set(&monitors, &changed, Some(Arc::clone(&now))).await;
    monitors.publish_all(&[&gone, &changed].map(|it| it.view.id.clone()));
    // It comes again after it was gone: that is published last.
    set(&monitors, &gone, Some(Arc::clone(&gone))).await;
    monitors.publish(Update, &gone);
    let told = rest(&monitors, events).await;
    let of = |which: &Established, kind| {
        let is_it = |event: &&ConnectionEvent| event.r#type() == kind;
        let told = told.iter().filter(is_it);
        let last = told.rev().find_map(|it| it.connections.get(&which.view.id));
        last.cloned()
    };
    assert_eq!(of(&gone, Delete), Some(gone.view.clone()));
    assert_eq!(of(&changed, Update), Some(now.view.clone()));
    assert_eq!(kinds(&told).last(), Some(&Update));
    assert!(
        told.last()
            .is_some_and(|it| it.connections.contains_key(&gone.view.id))
    );
}

/// A connection that is gone cannot be read any more: its DELETE waits whole, within a bound.
#[tokio::test]
async fn who_lets_too_many_ends_lie_is_cut_off() {
    let gone = established(1, 0);
    let monitors = standing(&[]).await;
    let events = follow(&monitors, false);
    for _ in 0..BACKLOG {
        monitors.publish(ConnectionEventType::Delete, &gone);
    }
    assert_eq!(monitors.len(), 1);
    monitors.publish(ConnectionEventType::Delete, &gone);
    assert_eq!(monitors.len(), 0);
    let events: Vec<_> = events.collect().await;
    assert_eq!(events.len(), 1 + BACKLOG + 1);
    let last = events.last().expect("some").as_ref().expect_err("cut off");
    assert_eq!(last.code(), tonic::Code::ResourceExhausted);
    assert!(last.message().contains("read faster"), "{last}");
    assert_eq!(monitors.cut_off.get(), 1);
}

/// The bytes that one source may hold, and a stream of it.
fn narrow() -> (Budget, Reader) {
    let budget = Budget::new(&Limits {
        bytes: Limit {
            all: 1 << 20,
            of_one: 64 << 10,
        },
        ..Limits::wide()
    });
    let reader = Reader {
        owner: Owner::Nsmgr,
        holder: Holder::process(Some(1), None),
        skips_answered: false,
    };
    (budget, reader)
}

/// Streams of one source share its bytes: what all of them let lie is bounded, and the bytes are free again when they have ended.
#[tokio::test]
async fn what_a_source_lets_lie_is_bounded_in_bytes() {
    let (budget, reader) = narrow();
    let monitors = standing_in(&budget, &[]).await;
    let gone = established(1, 4 << 10);
    let all = MonitorScopeSelector::default;
    let unread: Vec<_> = (0..4)
        .map(|_| monitors.subscribe(reader, all()).expect("a place"))
        .collect();
    let ours = follow(&monitors, false);
    for _ in 0..100 {
        monitors.publish(ConnectionEventType::Delete, &gone);
        assert!(budget.bytes.taken() < 1 << 20);
    }
    assert_eq!(monitors.len(), 1);
    assert_eq!(monitors.cut_off.get(), 4);
    assert_eq!(rest(&monitors, ours).await.len(), 1 + 100);
    let mut of_one = 0;
    for events in unread {
        let events: Vec<_> = events.collect().await;
        let last = events.last().expect("some").as_ref().expect_err("cut off");
        assert!(
            last.message().contains("limits.max_bytes_per_source"),
            "{last}"
        );
        of_one += events.len() - 2;
    }
    assert!((8..16).contains(&of_one), "{of_one}");
    assert_eq!(budget.bytes.taken(), 0);
    assert_eq!(budget.streams.taken(), 0);
}

/// A selector is kept as long as its stream, and counts.
#[tokio::test]
async fn a_selector_counts() {
    let (budget, reader) = narrow();
    let monitors = standing_in(&budget, &[]).await;
    let selector = MonitorScopeSelector {
        network_services: vec!["x".repeat(40 << 10)],
        ..MonitorScopeSelector::default()
    };
    let refused = monitors.subscribe(reader, selector).expect_err("too much");
    assert!(refused.to_string().contains("max_bytes"), "{refused}");
    assert_eq!((budget.bytes.taken(), budget.streams.taken()), (0, 0));
}

/// An event that the transport may still have counts until the transport has sent all.
#[tokio::test]
async fn what_is_read_and_not_sent_counts() {
    let (budget, reader) = narrow();
    let connections: Vec<_> = (0..10).map(|number| established(number, 4 << 10)).collect();
    let monitors = standing_in(&budget, &connections).await;
    let before = budget.bytes.taken();
    let all = MonitorScopeSelector::default();
    let mut events = monitors.subscribe(reader, all).expect("a place");
    let first = events.next().await.expect("one").expect("an event");
    assert_eq!(first.connections.len(), 10);
    assert!(budget.bytes.taken() - before > 40 << 10);
    let more = tokio::time::timeout(Duration::ZERO, events.next()).await;
    assert!(more.is_err(), "{more:?}");
    assert_eq!(budget.bytes.taken() - before, STREAM);
    drop(events);
    assert_eq!(budget.bytes.taken(), before);
}
