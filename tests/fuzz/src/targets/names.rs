//! Names, addresses and URLs in text.

use std::{fmt, str::FromStr};

use nsm_controlplane::liveness::Reachability;
use nsm_core::{
    link::LinkAlias,
    net::{IfName, MacAddr, NetnsUrl, PeerUrl, Vni},
    nsm::name::{Domain, InterdomainName},
    text::{Shown, printable},
};
use nsm_discovery::{
    dns::HostTarget,
    public_address::{BaseUrl, StunServer},
};

/// One text as everything that a text from elsewhere can be.
pub(super) fn text(bytes: &[u8]) {
    let Some(text) = super::text(bytes) else {
        return;
    };
    same_again::<Domain>(text);
    same_again::<InterdomainName>(text);
    same_again::<PeerUrl>(text);
    same_again::<NetnsUrl>(text);
    same_again::<IfName>(text);
    same_again::<MacAddr>(text);
    same_again::<Vni>(text);
    same_again::<LinkAlias>(text);
    same_again::<HostTarget>(text);
    same_again::<BaseUrl>(text);
    same_again::<StunServer>(text);
    if let Ok(url) = PeerUrl::configured(text) {
        assert_eq!(PeerUrl::configured(url.as_str()).as_ref(), Ok(&url));
    }
    let _ = text.parse::<Reachability>();
    let shown = [Shown(text).to_string(), printable(text, 40)];
    for shown in shown {
        assert!(
            !shown.chars().any(char::is_control),
            "a control character is shown: {shown:?}"
        );
    }
}

/// What is read is written as it reads: a name that changes on its way is another's.
fn same_again<T>(text: &str)
where
    T: FromStr + fmt::Display + fmt::Debug + PartialEq,
    T::Err: fmt::Display,
{
    match text.parse::<T>() {
        Ok(value) => {
            let written = value.to_string();
            let again = written.parse::<T>().ok();
            assert_eq!(
                again.as_ref(),
                Some(&value),
                "{text:?} is written {written:?}"
            );
        }
        Err(error) => assert!(!error.to_string().is_empty()),
    }
}
