//! The zone: what each name answers, and how it fails. Pure, but for reading the file.
//!
//! ```json
//! { "negative_ttl": 5,
//!   "names": { "cluster-1.example": { "ttl": 300, "a": ["203.0.113.10"], "aaaa": [], "fault": null,
//!                                     "srv": [{ "priority": 0, "weight": 0, "port": 5005, "target": "cluster-1.example" }] },
//!              "*": { "fault": "silent" } } }
//! ```
//! Names are lower-case without the final dot. `*` is no wildcard: its fault holds for every name that has none of its own.

use std::{
    collections::BTreeMap,
    fs,
    net::{Ipv4Addr, Ipv6Addr},
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
};

use anyhow::Context as _;
use serde::Deserialize;

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Zone {
    /// TTL of negative answers, in seconds.
    #[serde(default)]
    pub(crate) negative_ttl: u32,
    names: BTreeMap<String, Records>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct Records {
    /// In seconds.
    pub(crate) ttl: u32,
    pub(crate) a: Vec<Ipv4Addr>,
    pub(crate) aaaa: Vec<Ipv6Addr>,
    pub(crate) srv: Vec<Srv>,
    fault: Option<Fault>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Srv {
    pub(crate) priority: u16,
    pub(crate) weight: u16,
    pub(crate) port: u16,
    pub(crate) target: String,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Fault {
    ServFail,
    Refused,
    Silent,
    /// Over UDP nothing but the truncation bit.
    Truncate,
}

/// What a name answers.
pub(crate) enum Lookup<'a> {
    /// The name exists, with or without records of the type that is asked for.
    Found(&'a Records),
    /// The name exists only because names below it do (RFC 8020): no records, but no NXDOMAIN either.
    Empty,
    Missing,
}

impl Zone {
    pub(crate) fn parse(json: &str) -> serde_json::Result<Self> {
        serde_json::from_str(json)
    }

    pub(crate) fn fault(&self, name: &str) -> Option<Fault> {
        let of = |name| {
            self.names
                .get(name)
                .and_then(|records: &Records| records.fault)
        };
        of(name).or_else(|| of("*"))
    }

    pub(crate) fn lookup(&self, name: &str) -> Lookup<'_> {
        if let Some(records) = self.names.get(name) {
            return Lookup::Found(records);
        }
        let below = format!(".{name}");
        if self.names.keys().any(|other| other.ends_with(&below)) {
            return Lookup::Empty;
        }
        Lookup::Missing
    }
}

/// A zone that follows its file.
pub(crate) struct ZoneFile {
    path: PathBuf,
    /// Inode, size and modification time of what was read last.
    seen: (u64, u64, i64, i64),
    zone: Zone,
}

impl ZoneFile {
    pub(crate) fn open(path: &Path) -> anyhow::Result<Self> {
        let mut file = Self {
            path: path.to_owned(),
            seen: Default::default(),
            zone: Zone::default(),
        };
        file.refresh()?;
        Ok(file)
    }

    /// The zone as the file has it now.
    pub(crate) fn current(&mut self) -> anyhow::Result<&Zone> {
        self.refresh()?;
        Ok(&self.zone)
    }

    fn refresh(&mut self) -> anyhow::Result<()> {
        let shown = self.path.display();
        let metadata = fs::metadata(&self.path).with_context(|| format!("look at zone {shown}"))?;
        let found = (
            metadata.ino(),
            metadata.size(),
            metadata.mtime(),
            metadata.mtime_nsec(),
        );
        if found != self.seen {
            let text =
                fs::read_to_string(&self.path).with_context(|| format!("read zone {shown}"))?;
            self.zone = Zone::parse(&text).with_context(|| format!("zone {shown}"))?;
            self.seen = found;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ZONE: &str = r#"{"negative_ttl":5,"names":{
        "cluster-1.example":{"ttl":30,"a":["203.0.113.10"]},
        "registry.nsm-system.cluster-1.example":{"srv":[{"priority":0,"weight":0,"port":5005,"target":"cluster-1.example"}]},
        "broken.example":{"fault":"servfail"}}}"#;

    #[test]
    fn names_exist_are_empty_or_miss() {
        let zone = Zone::parse(ZONE).unwrap();
        assert!(
            matches!(zone.lookup("cluster-1.example"), Lookup::Found(records) if records.ttl == 30)
        );
        assert!(matches!(
            zone.lookup("nsm-system.cluster-1.example"),
            Lookup::Empty
        ));
        assert!(matches!(zone.lookup("example"), Lookup::Empty));
        assert!(matches!(zone.lookup("1.example"), Lookup::Missing));
        assert!(matches!(zone.lookup("cluster-2.example"), Lookup::Missing));
    }

    #[test]
    fn a_fault_of_its_own_comes_before_that_of_all() {
        let zone = Zone::parse(ZONE).unwrap();
        assert_eq!(zone.fault("broken.example"), Some(Fault::ServFail));
        assert_eq!(zone.fault("cluster-1.example"), None);
        let all = r#"{"names":{"*":{"fault":"silent"},"x.example":{"fault":"refused"}}}"#;
        let all = Zone::parse(all).unwrap();
        assert_eq!(all.fault("cluster-1.example"), Some(Fault::Silent));
        assert_eq!(all.fault("x.example"), Some(Fault::Refused));
    }

    #[test]
    fn mistakes_are_refused() {
        for bad in [
            "",
            "{}",
            r#"{"names":{"x":{"fault":"explode"}}}"#,
            r#"{"names":{"x":{"aa":[]}}}"#,
        ] {
            assert!(Zone::parse(bad).is_err(), "{bad} passed");
        }
    }

    #[test]
    fn a_replaced_file_is_read_anew() {
        let dir = std::env::temp_dir().join(format!("nsm-world-dns-{}", std::process::id()));
        fs::create_dir_all(&dir).unwrap();
        let path = dir.join("zone.json");
        fs::write(&path, ZONE).unwrap();
        let mut file = ZoneFile::open(&path).unwrap();
        assert!(matches!(
            file.current().unwrap().lookup("new.example"),
            Lookup::Missing
        ));
        let fresh = dir.join("zone.new");
        fs::write(&fresh, r#"{"names":{"new.example":{}}}"#).unwrap();
        fs::rename(&fresh, &path).unwrap();
        assert!(matches!(
            file.current().unwrap().lookup("new.example"),
            Lookup::Found(_)
        ));
        fs::remove_dir_all(dir).unwrap();
    }
}
