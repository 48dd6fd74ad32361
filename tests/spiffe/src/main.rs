//! `nsm-spiffe FOLDER LIFE-SECONDS INTERVAL-MILLISECONDS NAME=ID…`: a Workload API for each id, on `FOLDER/NAME.sock`. All trust domains of
//! the ids believe each other.
#![forbid(unsafe_code)]

use std::{env, path::PathBuf, process::ExitCode, time::Duration};

use nsm_spiffe::workload::{Federation, serve, trust_domain};

#[tokio::main]
async fn main() -> ExitCode {
    let Some((folder, life, interval, workloads)) = arguments() else {
        eprintln!("usage: nsm-spiffe FOLDER LIFE-SECONDS INTERVAL-MILLISECONDS NAME=ID…");
        return ExitCode::from(2);
    };
    let trust_domains = workloads.iter().map(|(_, id)| trust_domain(id));
    let federation = Federation::of(trust_domains, life);
    let sockets = workloads
        .iter()
        .map(|(name, id)| (folder.join(format!("{name}.sock")), id.clone()));
    println!("serving");
    match serve(federation, sockets.collect(), interval).await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("nsm-spiffe: {error}");
            ExitCode::FAILURE
        }
    }
}

type Arguments = (PathBuf, Duration, Duration, Vec<(String, String)>);

fn arguments() -> Option<Arguments> {
    let mut words = env::args().skip(1);
    let folder = words.next()?.into();
    let life = Duration::from_secs(words.next()?.parse().ok()?);
    let interval = Duration::from_millis(words.next()?.parse().ok()?);
    let workloads = words.map(|word| {
        let (name, id) = word.split_once('=')?;
        Some((name.to_owned(), id.to_owned()))
    });
    Some((folder, life, interval, workloads.collect::<Option<_>>()?))
}
