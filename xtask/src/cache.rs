//! Where this user's caches are: nothing that is kept from one run to the next is in the checkout, unless cargo made it.

use std::{env, path::PathBuf};

use anyhow::{Context as _, Result};

/// The directory of the cache of this name: `${XDG_CACHE_HOME:-~/.cache}/proxy-nsmgr/NAME`. It need not exist yet.
///
/// # Errors
/// When the environment does not say where caches are.
pub(crate) fn directory(name: &str) -> Result<PathBuf> {
    let home = home(env::var_os("XDG_CACHE_HOME"), env::var_os("HOME")).with_context(|| {
        format!(
            "no place to keep {name}: neither XDG_CACHE_HOME nor HOME is set to an absolute path"
        )
    })?;
    Ok(home.join("proxy-nsmgr").join(name))
}

/// The user's cache directory by the XDG base directory specification, which has relative paths ignored.
fn home(xdg: Option<impl Into<PathBuf>>, home: Option<impl Into<PathBuf>>) -> Option<PathBuf> {
    let xdg = absolute(xdg);
    xdg.or_else(|| Some(absolute(home)?.join(".cache")))
}

/// An empty path, which stands for none, is not absolute either.
fn absolute(path: Option<impl Into<PathBuf>>) -> Option<PathBuf> {
    path.map(Into::into)
        .filter(|path: &PathBuf| path.is_absolute())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_cache_is_where_the_user_has_it() {
        let found = |xdg, user| home(xdg, user);
        assert_eq!(found(Some("/c"), Some("/h")), Some("/c".into()));
        assert_eq!(found(Some("c"), Some("/h")), Some("/h/.cache".into()));
        assert_eq!(found(Some(""), Some("/h")), Some("/h/.cache".into()));
        assert_eq!(found(None, Some("/h")), Some("/h/.cache".into()));
        assert_eq!(found(None, Some("")), None);
        assert_eq!(found(None, None), None);
    }
}
