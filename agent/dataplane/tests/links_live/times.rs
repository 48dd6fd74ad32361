//! How long links take. Bounds are wide, for machines that are busy; the numbers are printed (`--nocapture`).

use std::{
    collections::HashMap,
    time::{Duration, Instant},
};

use nsm_dataplane::links::{Links, NodeWatch};

use crate::support::{alias, domain, inside, name, netns, vxlan};

const TIMES: usize = 50;

/// Less than it takes to create a link on the node and move it, 16 ms: a busy machine must not pass for a wrong design.
const BOUND: Duration = Duration::from_millis(10);

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs root: makes network namespaces and links"]
async fn links_are_quick() {
    let links = Links::in_namespace(netns());
    let (mut create, mut refresh, mut change, mut look, mut delete) =
        (vec![], vec![], vec![], vec![], vec![]);
    // The node's first VXLAN link opens the socket, and has the kernel patch its code for it: some 0.5 ms more.
    let (first, pod) = (netns(), netns());
    report(
        "the first",
        vec![timed(links.up_vxlan(&first, &vxlan(99))).await.0],
    );
    for round in 0..TIMES {
        let mut spec = vxlan(100 + u32::try_from(round).unwrap());
        create.push(timed(links.up_vxlan(&pod, &spec)).await.0);
        let (time, same) = timed(links.up_vxlan(&pod, &spec)).await;
        refresh.push(time);
        assert_eq!(same.unwrap().operations, 0);
        spec.remote = "192.0.2.3".parse().unwrap();
        change.push(timed(links.up_vxlan(&pod, &spec)).await.0);
        look.push(timed(links.readings(&pod)).await.0);
        delete.push(timed(links.down(&pod, &spec.link.alias)).await.0);
    }
    let create = report("create", create);
    let refresh = report("refresh that changes nothing", refresh);
    report("refresh with another remote", change);
    report("statistics", look);
    report("delete", delete);
    assert!(create < BOUND && refresh < BOUND, "{create:?}, {refresh:?}");
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs root: makes network namespaces and links"]
async fn many_links_go_in_one_step() {
    const MANY: u32 = 20;
    let links = Links::in_namespace(netns());
    let pod = netns();
    let fill = async |first: u32| {
        let mut aliases = vec![];
        for number in first..first + MANY {
            let mut spec = vxlan(number);
            spec.link.name = name(&format!("nsm-{number}"));
            (spec.link.routes, spec.link.neighbours) = (vec![], vec![]);
            links.up_vxlan(&pod, &spec).await.unwrap();
            aliases.push(spec.link.alias);
        }
        aliases
    };
    let aliases = fill(1000).await;
    let (together, removed) = timed(links.down_many(&pod, &aliases)).await;
    assert_eq!(removed.unwrap(), aliases.len());
    let aliases = fill(2000).await;
    let start = Instant::now();
    for alias in &aliases {
        assert!(links.down(&pod, alias).await.unwrap());
    }
    let singly = start.elapsed();
    println!("{MANY} links: together {together:?}, one by one {singly:?}");
    assert!(
        together < singly / 2,
        "together {together:?}, one by one {singly:?}"
    );
}

/// Deleting waits in the kernel; making must not wait for it.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs root: makes network namespaces and links"]
async fn deleting_holds_nobody_up() {
    let links = Links::in_namespace(netns());
    let mut removing = tokio::task::JoinSet::new();
    for vni in 0..8 {
        let (links, pod, spec) = (links.clone(), netns(), vxlan(3000 + vni));
        links.up_vxlan(&pod, &spec).await.unwrap();
        removing.spawn(async move { links.down(&pod, &spec.link.alias).await });
    }
    let pod = netns();
    let mut create = vec![];
    for round in 0..20 {
        let mut spec = vxlan(4000 + round);
        spec.link.name = name(&format!("nsm-{round}"));
        (spec.link.routes, spec.link.neighbours) = (vec![], vec![]);
        create.push(timed(links.up_vxlan(&pod, &spec)).await.0);
    }
    let start = Instant::now();
    while let Some(result) = removing.join_next().await {
        assert!(result.unwrap().unwrap());
    }
    println!("last delete came {:?} after the creates", start.elapsed());
    report("create beside eight deletes", create);
    assert!(!links.down(&pod, &alias()).await.unwrap());
}

/// Pod links, in turn with VXLAN devices that have the same contents.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs root: makes network namespaces and links"]
async fn pod_links_beside_devices() {
    let links = Links::in_namespace(netns());
    let (mut create, mut refresh, mut delete, mut device) = (vec![], vec![], vec![], vec![]);
    let pod = netns();
    for round in 0..TIMES {
        let spec = vxlan(100 + u32::try_from(round).unwrap());
        device.push(timed(links.up_vxlan(&pod, &spec)).await.0);
        links.down(&pod, &spec.link.alias).await.unwrap();
        create.push(timed(links.up_pod_link(&pod, &spec.link)).await.0);
        let (time, same) = timed(links.up_pod_link(&pod, &spec.link)).await;
        refresh.push(time);
        assert_eq!(same.unwrap().pod.operations, 0);
        let aliases = [spec.link.alias];
        delete.push(timed(links.down_pod_links(&aliases)).await.0);
    }
    report("create a VXLAN device", device);
    report("create", create);
    report("refresh that changes nothing", refresh);
    report("delete", delete);
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
        let mut spec = vxlan(1).link;
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
