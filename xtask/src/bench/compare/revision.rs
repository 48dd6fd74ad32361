//! The programs of another revision of this repository.
//!
//! They are built in a git worktree that stands only meanwhile, below a cache directory and not in the tree. Its target directory stays
//! there, so that the next revision builds what differs, and so do the programs of each commit, so that the same one builds nothing.

use std::{
    collections::BTreeSet,
    env,
    fs::{self, File},
    path::{Path, PathBuf},
    process::Command,
    time::SystemTime,
};

use anyhow::{Context as _, Result, ensure};
use serde::Serialize;
use sha2::{Digest as _, Sha256};

use super::super::{
    needs::names,
    programs::{Built, Program},
};
use crate::{cache, cargo::Tree};

/// Commits whose programs are kept: some ten megabytes each.
const KEPT: usize = 8;

/// A commit of this repository.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub(super) struct Revision {
    /// The repository that has it.
    #[serde(skip)]
    pub(super) repository: PathBuf,
    /// As it was asked for.
    pub(super) asked: String,
    /// The commit's full hash.
    pub(super) commit: String,
    /// Short hash and subject.
    pub(super) shown: String,
}

impl Revision {
    /// Looks it up in the repository at this path.
    ///
    /// # Errors
    /// When that is no git repository, or has no such commit.
    pub(super) fn find(repository: &Path, asked: &str) -> Result<Self> {
        let wanted = format!("{asked}^{{commit}}");
        let commit = git(repository, &["rev-parse", "--verify", "--quiet", "--end-of-options", &wanted])
            .with_context(|| {
                format!(
                    "{asked:?} is no commit of {} (of a shallow clone, `git fetch --unshallow` brings the earlier ones)",
                    repository.display()
                )
            })?;
        let shown = git(repository, &["log", "-1", "--format=%h (%s)", &commit])?;
        Ok(Self {
            repository: repository.to_owned(),
            asked: asked.to_owned(),
            commit,
            shown,
        })
    }

    /// This revision's programs of those wanted, and the present ones of what measures. One that this revision has no sources of is
    /// not among them.
    ///
    /// # Errors
    /// When they do not build, or git or the cache directory fails.
    pub(super) fn programs(&self, wanted: BTreeSet<Program>, present: &Built) -> Result<Built> {
        let cache = cache::directory("compare")?;
        fs::create_dir_all(&cache).with_context(|| format!("make {}", cache.display()))?;
        // One at a time: all use the same worktree, and what a killed one left there is nobody's.
        let lock = cache.join("lock");
        let lock = File::create(&lock).with_context(|| format!("open {}", lock.display()))?;
        lock.lock().context("wait for another comparison's build")?;

        let kept = cache.join("programs").join(self.key()?);
        let file = |program: &Program| kept.join(program.name());
        let missing: BTreeSet<_> = wanted
            .iter()
            .copied()
            .filter(|program| !file(program).exists() && self.has(program.source()))
            .collect();
        if !missing.is_empty() {
            eprintln!("==> building {} of {}", names(&missing), self.shown);
            self.build(&missing, &cache, &kept)?;
        }
        let mut programs = present.clone();
        for program in wanted {
            if file(&program).exists() {
                programs.insert(program, file(&program));
            } else {
                programs.remove(program);
            }
        }
        forget_old(&cache.join("programs"), KEPT);
        Ok(programs)
    }

    fn build(&self, missing: &BTreeSet<Program>, cache: &Path, kept: &Path) -> Result<()> {
        let worktree = Worktree::add(&self.repository, cache.join("tree"), &self.commit)?;
        let tree = Tree {
            root: worktree.path.clone(),
            target: Some(cache.join("target")),
            wrapper: None,
        };
        let built = Built::build(&tree, missing)
            .with_context(|| format!("{} does not build: choose a later revision", self.shown))?;
        fs::create_dir_all(kept).with_context(|| format!("make {}", kept.display()))?;
        for &program in missing {
            let (from, to) = (built.get(program)?, kept.join(program.name()));
            // A copy that was cut short must not be taken for the program.
            let part = to.with_extension("part");
            fs::copy(from, &part).with_context(|| format!("copy {}", from.display()))?;
            fs::rename(&part, &to).with_context(|| format!("write {}", to.display()))?;
        }
        Ok(())
    }

    /// Whether its tree has this file.
    fn has(&self, path: &str) -> bool {
        let object = format!("{}:{path}", self.commit);
        git(&self.repository, &["cat-file", "-e", &object]).is_ok()
    }

    /// Programs differ by commit, compiler and flags.
    fn key(&self) -> Result<String> {
        let compiler = Command::new(env::var_os("RUSTC").unwrap_or_else(|| "rustc".into()))
            .arg("-vV")
            .output()
            .context("cannot start rustc")?;
        let mut hash = Sha256::new();
        hash.update(&compiler.stdout);
        hash.update(
            env::var_os("RUSTFLAGS")
                .unwrap_or_default()
                .as_encoded_bytes(),
        );
        let hash = u64::from_be_bytes(hash.finalize()[..8].try_into()?);
        Ok(format!("{}-{hash:016x}", self.commit))
    }
}

/// A checkout of a commit that is removed when this is dropped.
struct Worktree {
    repository: PathBuf,
    path: PathBuf,
}

impl Worktree {
    fn add(repository: &Path, path: PathBuf, commit: &str) -> Result<Self> {
        let worktree = Self {
            repository: repository.to_owned(),
            path,
        };
        // A run that was killed had no time for it.
        worktree.remove();
        let shown = worktree.path.display().to_string();
        let add = ["worktree", "add", "--quiet", "--detach", "--force"];
        git(repository, &[&add[..], &[&shown, commit]].concat()).context("make a worktree")?;
        Ok(worktree)
    }

    fn remove(&self) {
        let shown = self.path.display().to_string();
        // Git does not know the worktree of another clone: the folder is removed here in any case.
        let _ = git(
            &self.repository,
            &["worktree", "remove", "--force", "--force", &shown],
        );
        if self.path.exists() {
            if let Err(error) = fs::remove_dir_all(&self.path) {
                eprintln!("{shown} cannot be removed: {error}");
            }
            let _ = git(&self.repository, &["worktree", "prune"]);
        }
    }
}

impl Drop for Worktree {
    fn drop(&mut self) {
        self.remove();
    }
}

/// Removes all but the newest folders.
fn forget_old(folder: &Path, keep: usize) {
    let Ok(entries) = fs::read_dir(folder) else {
        return;
    };
    let mut folders: Vec<(SystemTime, PathBuf)> = entries
        .filter_map(|entry| {
            let entry = entry.ok()?;
            Some((entry.metadata().ok()?.modified().ok()?, entry.path()))
        })
        .collect();
    folders.sort();
    let old = folders.len().saturating_sub(keep);
    for (_, path) in folders.drain(..old) {
        if let Err(error) = fs::remove_dir_all(&path) {
            eprintln!("{} cannot be removed: {error}", path.display());
        }
    }
}

/// Runs git in a repository and returns what it printed.
fn git(repository: &Path, arguments: &[&str]) -> Result<String> {
    let mut command = Command::new("git");
    command
        .args(["-c", "core.hooksPath=/dev/null"])
        .args(arguments)
        .current_dir(repository);
    // Those of a hook that runs this would name another tree.
    for variable in ["GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE"] {
        command.env_remove(variable);
    }
    let output = command.output().context("cannot start git")?;
    ensure!(
        output.status.success(),
        "git {} failed: {}",
        arguments.join(" "),
        String::from_utf8_lossy(&output.stderr).trim()
    );
    Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A repository of one commit.
    fn repository() -> tempfile::TempDir {
        let directory = tempfile::tempdir().unwrap();
        let git = |arguments: &[&str]| git(directory.path(), arguments).unwrap();
        git(&["init", "--quiet"]);
        fs::write(directory.path().join("file"), "text").unwrap();
        git(&["add", "file"]);
        let author = ["-c", "user.name=test", "-c", "user.email=test@example.org"];
        let commit = ["commit", "--quiet", "--message=Begin"];
        git(&[&author[..], &commit].concat());
        directory
    }

    #[test]
    fn a_revision_is_a_commit() {
        let repository = repository();
        let find = |asked| Revision::find(repository.path(), asked);
        let head = find("HEAD").unwrap();
        assert!(head.shown.ends_with(" (Begin)") && head.commit.len() == 40);
        assert!(head.has("file") && !head.has("another"));
        let said = format!("{:#}", find("no-such-revision").unwrap_err());
        assert!(
            said.contains("\"no-such-revision\" is no commit of "),
            "{said}"
        );
        // Not an option of git, whatever it looks like.
        assert!(find("--all").is_err());
    }

    #[test]
    fn a_worktree_is_gone_with_its_owner_and_replaces_what_was_left() {
        let (repository, directory) = (repository(), tempfile::tempdir().unwrap());
        let path = directory.path().join("tree");
        fs::create_dir(&path).unwrap();
        fs::write(path.join("left"), "by a run that was killed").unwrap();
        let head = Revision::find(repository.path(), "HEAD").unwrap();
        let worktree = Worktree::add(repository.path(), path.clone(), &head.commit).unwrap();
        assert!(path.join("file").exists() && !path.join("left").exists());
        let known = || git(repository.path(), &["worktree", "list"]).unwrap();
        assert_eq!(known().lines().count(), 2);
        drop(worktree);
        assert!(!path.exists());
        assert_eq!(known().lines().count(), 1);
    }

    #[test]
    fn the_oldest_programs_are_forgotten() {
        let directory = tempfile::tempdir().unwrap();
        for name in ["a", "b", "c"] {
            fs::create_dir(directory.path().join(name)).unwrap();
        }
        forget_old(directory.path(), 2);
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 2);
        forget_old(&directory.path().join("not-there"), 2);
    }
}
