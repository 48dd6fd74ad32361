//! What a Request waits for before it is granted: the path's proof, by count and not by the clock.

use anyhow::{Result, ensure};
use nsm_e2e::{Served, metrics};
use nsm_world::{Agent, Cloud};

/// How an agent's proofs of paths went until now.
#[derive(Debug, PartialEq)]
struct Preflights {
    standing: f64,
    answered: f64,
    silent: f64,
    /// What the answered ones waited for.
    answers: f64,
}

impl Preflights {
    fn of(agent: &Agent) -> Result<Self> {
        let page = metrics::page(agent)?;
        let value = |name: &str, labels: &[String]| {
            metrics::value(&page, &format!("proxy_nsmgr_{name}_total"), labels)
        };
        let of = |outcome: &str| value("preflights", &[format!("outcome=\"{outcome}\"")]);
        Ok(Self {
            standing: of("standing")?,
            answered: of("answered")?,
            silent: of("silent")?,
            answers: value("preflight_answers", &[])?,
        })
    }
}

#[test]
#[ignore = "needs root: namespaces, links, BPF"]
fn a_request_waits_for_one_answer_of_a_new_peer_and_for_none_of_one_that_is_known() -> Result<()> {
    let pair = Served::start("preflight", Cloud::Packet, 3)?;
    let nothing = Preflights {
        standing: 0.0,
        answered: 0.0,
        silent: 0.0,
        answers: 0.0,
    };
    let mut clients = Vec::new();
    for standing in [0.0, 1.0, 2.0] {
        let (client, _) = pair.connect(clients.len())?;
        clients.push(client);
        let found = Preflights::of(&pair.near)?;
        let wanted = Preflights {
            standing,
            answered: 1.0,
            answers: 1.0,
            ..nothing
        };
        ensure!(
            found == wanted,
            "connection {}: {found:?}, not {wanted:?}",
            clients.len()
        );
    }
    // The proof is asked for where the client is, and nowhere else.
    ensure!(Preflights::of(&pair.far)? == nothing);
    pair.close(clients)
}
