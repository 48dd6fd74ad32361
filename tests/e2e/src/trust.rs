//! Identities of the scenarios' processes, in PEM files of the world.

use std::{path::PathBuf, process::Command};

use anyhow::Result;
use nsm_spiffe::{Authority, Issued, replace};
use nsm_world::World;

/// Trust domains that believe each other, and the folder where their files are.
#[derive(Debug)]
pub struct Trust {
    /// One authority a trust domain.
    pub authorities: Vec<Authority>,
    folder: PathBuf,
}

impl Trust {
    /// An authority for each of these trust domains, with its bundle in the world's folder.
    ///
    /// # Errors
    /// The folder cannot be written.
    pub fn of(world: &World, trust_domains: &[&str]) -> Result<Self> {
        let folder = world.run_dir().to_owned();
        let authorities: Vec<_> = trust_domains
            .iter()
            .map(|name| Authority::of(name))
            .collect();
        for authority in &authorities {
            let file = folder.join(format!("{}.pem", authority.trust_domain()));
            replace(&file, &authority.bundle_pem())?;
        }
        Ok(Self {
            authorities,
            folder,
        })
    }

    /// Gives a process a good SVID of the `n`-th trust domain, by flags.
    ///
    /// # Errors
    /// Its files cannot be written.
    pub fn give(&self, command: &mut Command, n: usize, name: &str) -> Result<()> {
        self.show(command, &self.svid(n, name), name)
    }

    /// A good SVID of the pod of that name, in the namespace where NSM runs.
    #[must_use]
    pub fn svid(&self, n: usize, name: &str) -> Issued {
        self.authorities[n].svid(&format!("ns/nsm-system/pod/{name}"))
    }

    /// Gives an agent an SVID of the `n`-th trust domain, and the policy that lets `other` in, whose ids are of the `of`-th.
    ///
    /// # Errors
    /// Its files cannot be written.
    pub fn give_agent(
        &self,
        command: &mut Command,
        n: usize,
        name: &str,
        other: (&str, usize),
    ) -> Result<()> {
        self.give_policy(command, name, other)?;
        self.give(command, n, name)
    }

    /// Gives an agent the policy that lets `other` in, whose ids are of the `of`-th trust domain.
    ///
    /// # Errors
    /// Its file cannot be written.
    pub fn give_policy(
        &self,
        command: &mut Command,
        name: &str,
        (other, of): (&str, usize),
    ) -> Result<()> {
        let policy = self.folder.join(format!("{name}-policy.yaml"));
        let trust_domain = self.authorities[of].trust_domain();
        let text = format!(
            "domains:\n- domain: {other}\n  trust_domain: {trust_domain}\n  services: [\"*\"]\n"
        );
        replace(&policy, &text)?;
        command
            .args(["--insecure", "false", "--policy-file"])
            .arg(policy);
        Ok(())
    }

    /// Lets a process show a certificate, by flags; it believes all trust domains.
    ///
    /// # Errors
    /// Its files cannot be written.
    pub fn show(&self, command: &mut Command, issued: &Issued, name: &str) -> Result<()> {
        issued.write(&self.folder, name)?;
        let file = |name: String| self.folder.join(name);
        command
            .arg("--identity-certificate-file")
            .arg(file(format!("{name}.pem")));
        command
            .arg("--identity-key-file")
            .arg(file(format!("{name}_key.pem")));
        let bundles = self.authorities.iter().map(|authority| {
            let name = authority.trust_domain();
            format!("{name}={}", file(format!("{name}.pem")).display())
        });
        let bundles: Vec<String> = bundles.collect();
        command.arg("--identity-bundles").arg(bundles.join(","));
        Ok(())
    }

    /// Renews the SVID of a process that has it from [`Self::give`].
    ///
    /// # Errors
    /// Its files cannot be written.
    pub fn renew(&self, n: usize, name: &str) -> Result<()> {
        Ok(self.svid(n, name).write(&self.folder, name)?)
    }
}
