//! Which kernels are tested: Debian packages by name, version and hash.

/// A kernel package of Debian 12. Its name holds the ABI number, so another version is another name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Pin {
    /// Major and minor version of the kernel, by which it is chosen.
    pub(super) series: &'static str,
    /// The hook at which the agent's BPF programs hang on it, as the agent's status names it.
    pub(super) hook: &'static str,
    /// The package's name before the ABI number.
    prefix: &'static str,
    abi: u32,
    /// The package's name after the ABI number.
    suffix: &'static str,
    /// The package's version.
    pub(super) version: &'static str,
    /// Of the package's file, in lower-case hexadecimal.
    pub(super) sha256: &'static str,
}

/// Debian 12's own kernel, which has clsact only; and its newest from the backports, which has tcx.
const PINS: [Pin; 2] = [
    Pin {
        series: "6.1",
        hook: "clsact",
        prefix: "linux-image-6.1.0-",
        abi: 57,
        suffix: "-cloud-amd64",
        version: "6.1.192-3",
        sha256: "4fdd0172a8c3f41a97e92465b2ac1867e1c10d82d7aeed3d26ee7a5d14df1754",
    },
    Pin {
        series: "6.12",
        hook: "tcx",
        prefix: "linux-image-6.12.",
        abi: 117,
        suffix: "+deb12-cloud-amd64",
        version: "6.12.117-1~deb12u1",
        sha256: "5195b288dec79e2981d6b84457f38b7ce7310a2d702930ec7d07209c7f78ce37",
    },
];

/// The series that is booted, also by tests, unless another is asked for.
pub(crate) const DEFAULT_SERIES: &str = "6.12";

/// All pins, oldest first.
pub(super) fn all() -> impl Iterator<Item = &'static Pin> {
    PINS.iter()
}

/// The series of all pins, oldest first.
pub(crate) fn all_series() -> impl Iterator<Item = &'static str> {
    PINS.iter().map(|pin| pin.series)
}

/// The pin of a series, from the command line.
pub(super) fn of_series(series: &str) -> Result<&'static Pin, String> {
    let found = PINS.iter().find(|pin| pin.series == series);
    found.ok_or_else(|| {
        let known: Vec<_> = all_series().collect();
        format!(
            "one of {}; --image takes any other kernel",
            known.join(", ")
        )
    })
}

impl Pin {
    /// The package's name.
    pub(super) fn package(&self) -> String {
        format!("{}{}{}", self.prefix, self.abi, self.suffix)
    }

    /// What the names of all packages of this series begin with.
    pub(super) fn prefix(&self) -> &'static str {
        self.prefix
    }

    /// The ABI number in the name of a package of this series; `None` for other packages.
    pub(super) fn abi_of(&self, package: &str) -> Option<u32> {
        package
            .strip_prefix(self.prefix)?
            .strip_suffix(self.suffix)?
            .parse()
            .ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_series_is_found_by_its_whole_name() {
        assert_eq!(of_series("6.1").unwrap().series, "6.1");
        assert_eq!(of_series("6.12").unwrap().series, "6.12");
        let error = of_series("5.15").unwrap_err();
        assert!(error.contains("6.1, 6.12"), "{error}");
    }

    #[test]
    fn the_abi_number_is_read_from_names_of_the_series_only() {
        let pin = of_series("6.12").unwrap();
        assert_eq!(pin.abi_of(&pin.package()), Some(pin.abi));
        assert_eq!(
            pin.abi_of("linux-image-6.12.94+deb12-cloud-amd64"),
            Some(94)
        );
        for other in [
            "linux-image-6.12-cloud-amd64",
            "linux-image-6.12.94+deb12-amd64",
            "linux-image-6.12.94+deb12-cloud-amd64-unsigned",
            "linux-image-6.1.0-57-cloud-amd64",
        ] {
            assert_eq!(pin.abi_of(other), None, "{other}");
        }
    }

    #[test]
    fn pins_are_complete() {
        for pin in &PINS {
            assert!(pin.package().starts_with("linux-image-"), "{pin:?}");
            assert_eq!(pin.sha256.len(), 64, "{pin:?}");
            assert!(
                pin.sha256
                    .bytes()
                    .all(|byte| byte.is_ascii_hexdigit() && !byte.is_ascii_uppercase()),
                "{pin:?}"
            );
        }
    }
}
