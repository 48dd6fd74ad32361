//! How long links take. Bounds are wide, for machines that are busy; the numbers are printed (`--nocapture`).

use std::{
    collections::HashMap,
    time::{Duration, Instant},
};

use nsm_dataplane::links::{Links, NodeWatch};

use crate::support::{domain, inside, link, name, netns};

const TIMES: usize = 50;

/// Less than it takes to create a link on the node and move it, 16 ms: a busy machine must not pass for a wrong design.
const BOUND: Duration = Duration::from_millis(10);

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs root: makes network namespaces and links"]
async fn links_are_quick() {
    let (links, pod) = (Links::in_namespace(netns()), netns());
    let (mut create, mut refresh, mut look, mut soon, mut delete) =
        (vec![], vec![], vec![], vec![], vec![]);
    for _ in 0..TIMES {
        let spec = link(1, 2);
        create.push(timed(links.up_pod_link(&pod, &spec)).await.0);
        let (time, same) = timed(links.up_pod_link(&pod, &spec)).await;
        refresh.push(time);
        assert_eq!(same.unwrap().pod.operations, 0);
        look.push(timed(links.readings(&pod)).await.0);
        soon.push(timed(links.down_pod_link_soon(&spec.alias)).await.0);
        delete.push(timed(links.settled()).await.0);
    }
    let create = report("create", create);
    let refresh = report("refresh that changes nothing", refresh);
    report("statistics", look);
    report("have deleted soon", soon);
    report("delete", delete);
    assert!(create < BOUND && refresh < BOUND, "{create:?}, {refresh:?}");
}

/// Deleting waits in the kernel; making must not wait for it.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs root: makes network namespaces and links"]
async fn deleting_holds_nobody_up() {
    let links = Links::in_namespace(netns());
    let mut removing = tokio::task::JoinSet::new();
    for _ in 0..8 {
        let (links, spec) = (links.clone(), link(1, 2));
        links.up_pod_link(&netns(), &spec).await.unwrap();
        removing.spawn(async move { links.down_pod_links(&[spec.alias]).await });
    }
    let pod = netns();
    let mut create = vec![];
    for round in 0..20 {
        let mut spec = link(1, 2);
        spec.name = name(&format!("nsm-{round}"));
        (spec.routes, spec.neighbours) = (vec![], vec![]);
        create.push(timed(links.up_pod_link(&pod, &spec)).await.0);
    }
    let start = Instant::now();
    while let Some(result) = removing.join_next().await {
        assert_eq!(result.unwrap().unwrap(), 1);
    }
    println!("last delete came {:?} after the creates", start.elapsed());
    report("create beside eight deletes", create);
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs root: makes network namespaces and links"]
async fn many_pod_links_are_found_and_deleted_in_one_step() {
    const MANY: usize = 300;
    let (node, pod) = (netns(), netns());
    let links = Links::in_namespace(node.clone());
    let mut aliases = vec![];
    let mut made = HashMap::new();
    for number in 0..MANY {
        let mut spec = link(1, 2);
        spec.name = name(&format!("nsm-{number}"));
        (spec.addresses, spec.routes, spec.neighbours) = (vec![], vec![], vec![]);
        let link = links.up_pod_link(&pod, &spec).await.unwrap().node;
        made.insert(link.index, link);
        aliases.push(spec.alias);
    }
    let (time, found) = timed(links.pod_links(&domain())).await;
    assert_eq!(found.unwrap().len(), MANY);
    println!("{MANY} are found in {time:?}");
    let mut watch = inside(&node, || NodeWatch::open().unwrap());
    for what in ["the first look", "a look without changes"] {
        let start = Instant::now();
        assert!(watch.look(&made).unwrap().mended.is_empty());
        println!("{what} at {MANY}: {:?}", start.elapsed());
    }
    let (time, removed) = timed(links.down_pod_links(&aliases)).await;
    assert_eq!(removed.unwrap(), MANY);
    println!("{MANY} are deleted in {time:?}");
}

async fn timed<T>(call: impl Future<Output = T>) -> (Duration, T) {
    let start = Instant::now();
    let result = call.await;
    (start.elapsed(), result)
}

/// Prints and returns the median.
fn report(what: &str, mut times: Vec<Duration>) -> Duration {
    times.sort();
    let (median, ninth) = (times[times.len() / 2], times[times.len() * 9 / 10]);
    println!(
        "{what}: least {:?}, median {median:?}, p90 {ninth:?}, max {:?}",
        times[0],
        times[times.len() - 1]
    );
    median
}
