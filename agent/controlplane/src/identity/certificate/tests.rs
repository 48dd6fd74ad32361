use nsm_spiffe::{Authority, Issued, Wanted, self_signed};
use rustls::crypto::ring;

use super::*;

const ID: &str = "spiffe://one.example/ns/default/pod/nsc-1";

fn leaf(issued: &Issued) -> CertificateDer<'static> {
    issued.chain[0].clone().into()
}

fn bundles(authorities: &[&Authority]) -> Bundles {
    let mut bundles = Bundles::default();
    for authority in authorities {
        let trust_domain = authority.trust_domain().parse().unwrap();
        bundles
            .insert(trust_domain, [authority.bundle().into()])
            .unwrap();
    }
    bundles
}

fn verify(bundles: &Bundles, issued: &Issued) -> Result<Leaf, BadCertificate> {
    let algorithms = ring::default_provider().signature_verification_algorithms;
    bundles.verify(&leaf(issued), &[], SystemTime::now(), &algorithms)
}

#[test]
fn an_svid_is_believed_by_the_bundle_of_its_own_trust_domain() {
    let [one, two] = ["one.example", "two.example"].map(Authority::of);
    let both = bundles(&[&one, &two]);
    for authority in [&one, &two] {
        let issued = authority.svid("ns/default/pod/nsc-1");
        let leaf = verify(&both, &issued).unwrap();
        assert_eq!(leaf.id.trust_domain().as_str(), authority.trust_domain());
        assert!(leaf.key.is_some());
        let left = leaf.not_after.duration_since(SystemTime::now()).unwrap();
        assert!(left <= Duration::from_secs(3600), "{left:?}");
    }
    // An authority vouches for its own trust domain and no other.
    let forged = two.issue(&Wanted::of(ID));
    let refused = verify(&both, &forged);
    assert!(
        matches!(refused, Err(BadCertificate::Untrusted { .. })),
        "{refused:?}"
    );
    let refused = verify(&bundles(&[&one]), &two.svid("x"));
    assert!(
        matches!(refused, Err(BadCertificate::UnknownTrustDomain { .. })),
        "{refused:?}"
    );
}

#[test]
fn what_is_no_svid_of_a_workload_is_refused_by_its_own_name() {
    let authority = Authority::of("one.example");
    let bundles = bundles(&[&authority]);
    let good = || Wanted::of(ID);
    let refused = |wanted: &Wanted| verify(&bundles, &authority.issue(wanted)).unwrap_err();
    let uris = |uris: &[&str]| Wanted {
        uris: uris.iter().map(ToString::to_string).collect(),
        ..good()
    };
    assert_eq!(refused(&uris(&[])), BadCertificate::UriNames(0));
    assert_eq!(
        refused(&uris(&[ID, "spiffe://one.example/other"])),
        BadCertificate::UriNames(2)
    );
    let found = refused(&uris(&["https://one.example/x"]));
    assert!(matches!(found, BadCertificate::Id(_)), "{found:?}");
    let found = refused(&Wanted {
        is_authority: true,
        ..good()
    });
    assert!(matches!(found, BadCertificate::Authority(_)), "{found:?}");
    let found = refused(&Wanted {
        may_sign: true,
        ..good()
    });
    assert!(matches!(found, BadCertificate::MaySign(_)), "{found:?}");
    let found = refused(&Wanted {
        begins: -120,
        ends: -60,
        ..good()
    });
    assert!(matches!(found, BadCertificate::Expired { .. }), "{found:?}");
    let found = refused(&Wanted {
        begins: 60,
        ..good()
    });
    assert!(matches!(found, BadCertificate::NotYet { .. }), "{found:?}");
    let found = verify(&bundles, &self_signed(&good())).unwrap_err();
    assert!(
        matches!(found, BadCertificate::Untrusted { .. }),
        "{found:?}"
    );
}

#[test]
fn bytes_of_others_are_no_certificate_and_no_panic() {
    let issued = Authority::of("one.example").svid("x");
    let whole = issued.chain[0].clone();
    for length in 0..whole.len() {
        let cut: CertificateDer<'_> = whole[..length].into();
        assert!(
            matches!(Leaf::read(&cut), Err(BadCertificate::Malformed(_))),
            "{length}"
        );
    }
    let longer: CertificateDer<'_> = [whole, vec![0]].concat().into();
    assert!(Leaf::read(&longer).is_err());
    assert!(
        Bundles::default()
            .insert("one.example".parse().unwrap(), [])
            .is_err()
    );
}
