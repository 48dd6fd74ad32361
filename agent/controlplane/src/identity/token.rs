//! The tokens that name who asks, hop by hop.
//!
//! Every NSM call carries two pieces of gRPC metadata: `nsm-client-token`, a JWT whose `sub` is the
//! caller's SPIFFE id, and `nsm-client-token-expires`, when it expires (RFC 3339 with nanoseconds).
//! The receiver writes both into the previous path segment; the smallest expiry on the path is how
//! long a connection lives without a refresh. (NSM sdk, `pkg/tools/token`.)
//!
//! A token is signed once and handed out until half of its life is over: a signature on every call
//! would cost more than the call, and a token with half a life left still carries a connection over
//! several refreshes.
//!
//! In mutual TLS it is the key of the SVID that the connection was made with (ES256): whoever has the certificate checks the token, and it
//! is for the other end alone. In plain text the key is a shared secret (HS256), as NSM's own test chains use over plain HTTP/2: such a token
//! names the caller, it does not prove who it is. Or it is an elliptic curve's (ES256), as NSM signs
//! with the key of its SVID: whoever knows the public key can check the token.

use std::{
    collections::HashMap,
    fmt,
    str::FromStr as _,
    sync::{Mutex, PoisonError},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use jsonwebtoken::{Algorithm, EncodingKey, Header};
use nsm_core::identity::SpiffeId;
use prost_types::Timestamp;
use serde::Serialize;
use tonic::metadata::{Ascii, MetadataMap, MetadataValue};

mod key;

use self::key::SigningKey;
pub use self::key::{Es256Key, KeyError};
use super::session::Session;

/// The metadata key of the token itself.
pub const TOKEN_KEY: &str = "nsm-client-token";

/// The metadata key of the token's expiry.
pub const EXPIRES_KEY: &str = "nsm-client-token-expires";

/// Why the metadata of a call holds no usable token.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TokenError {
    /// The call carries no such metadata at all: the caller is not an NSM client.
    #[error("the metadata {0:?} is missing: an NSM call carries {TOKEN_KEY:?} and {EXPIRES_KEY:?}")]
    Missing(&'static str),
    /// The value holds bytes that are no printable ASCII.
    #[error("the metadata {0:?} is not ASCII text")]
    NotText(&'static str),
    /// The token is there but empty.
    #[error("the metadata {TOKEN_KEY:?} is empty")]
    Empty,
    /// The expiry is no time of RFC 3339.
    #[error(
        "the metadata {EXPIRES_KEY:?} is {0:?}, not a time of RFC 3339 such as 2026-01-02T15:04:05.000000006Z"
    )]
    BadExpiry(String),
}

/// A hop's token for the next one. Nothing in it is verified.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Token {
    /// The JWT.
    pub text: String,
    /// When it expires, by the metadata beside it.
    pub expires: SystemTime,
}

/// The claims of a path token (RFC 7519 section 4.1).
#[derive(Serialize)]
struct Claims<'a> {
    sub: &'a str,
    #[serde(skip_serializing_if = "<[String]>::is_empty")]
    aud: &'a [String],
    exp: u64,
}

/// A token, ready to be put into metadata, and the times between which it is handed out.
struct Signed {
    token: MetadataValue<Ascii>,
    expires_text: MetadataValue<Ascii>,
    issued: SystemTime,
    expires: SystemTime,
}

/// Signs tokens of one identity and hands each out until half of its life is over.
pub struct TokenSource {
    spiffe_id: String,
    audience: Vec<String>,
    lifetime: Duration,
    state: Mutex<State>,
}

struct State {
    key: SigningKey,
    current: Option<Signed>,
    /// Those for peers with certificates.
    of_sessions: HashMap<Addressed, Signed>,
}

/// Whom a token is for, and what it was signed by: another certificate of either makes another token.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct Addressed {
    peer: SpiffeId,
    generation: u64,
    ends: SystemTime,
}

/// The most tokens for peers that are kept; of more, those whose time is over go, or all.
const MOST_TOKENS: usize = 4096;

impl TokenSource {
    /// Tokens of `spiffe_id`, signed by HS256 with `secret`, each valid for `lifetime`.
    pub fn hs256(spiffe_id: &str, secret: &[u8], lifetime: Duration) -> Self {
        Self::signing_with(SigningKey::secret(secret), spiffe_id, lifetime)
    }

    /// Tokens of `spiffe_id`, signed by ES256 with `key`, each valid for `lifetime`.
    ///
    /// # Errors
    /// The key's file cannot be read or holds no such key.
    pub fn es256(spiffe_id: &str, key: Es256Key, lifetime: Duration) -> Result<Self, KeyError> {
        let key = SigningKey::es256(key)?;
        Ok(Self::signing_with(key, spiffe_id, lifetime))
    }

    fn signing_with(key: SigningKey, spiffe_id: &str, lifetime: Duration) -> Self {
        // With two crypto backends in one build the library cannot choose and panics at the first
        // signature; naming ours rules that out. An error says that one is named already.
        let _ = jsonwebtoken::crypto::rust_crypto::DEFAULT_PROVIDER.install_default();
        Self {
            spiffe_id: spiffe_id.to_owned(),
            audience: Vec::new(),
            lifetime,
            state: Mutex::new(State {
                key,
                current: None,
                of_sessions: HashMap::new(),
            }),
        }
    }

    /// The same source with the claim `aud` set: the SPIFFE ids of the peers the token is for.
    #[must_use]
    pub fn with_audience(mut self, audience: impl IntoIterator<Item = String>) -> Self {
        self.audience = audience.into_iter().collect();
        self
    }

    /// The SPIFFE id that the tokens name.
    pub fn spiffe_id(&self) -> &str {
        &self.spiffe_id
    }

    /// A token that is valid at `now`, for nobody in particular.
    pub fn token(&self, now: SystemTime) -> Token {
        self.with_current(now, Signed::token)
    }

    /// A token for the other end of a TLS connection, signed with the key of the certificate that we have shown on it (NSM sdk,
    /// `pkg/tools/spiffejwt`). It lives no longer than the certificates of both. In plain text it is [`Self::token`].
    pub fn token_for(&self, session: Option<&Session>, now: SystemTime) -> Token {
        match session {
            Some(session) => self.token_to(session.peer(), session, now),
            None => self.token(now),
        }
    }

    /// A token for `audience` that the other end of `session` can check: it is signed with the key that was shown there.
    pub(crate) fn token_to(
        &self,
        audience: &SpiffeId,
        session: &Session,
        now: SystemTime,
    ) -> Token {
        self.with_addressed(audience, session, now, Signed::token)
    }

    /// Puts the token for the other end of a connection and its expiry into the metadata of a call, in place of what is there.
    pub fn apply_for(&self, session: Option<&Session>, metadata: &mut MetadataMap) {
        self.apply_at(SystemTime::now(), session, metadata);
    }

    /// The same with the token for nobody in particular.
    pub fn apply(&self, metadata: &mut MetadataMap) {
        self.apply_for(None, metadata);
    }

    fn apply_at(&self, now: SystemTime, session: Option<&Session>, metadata: &mut MetadataMap) {
        let both = |signed: &Signed| (signed.token.clone(), signed.expires_text.clone());
        let (token, expires) = match session {
            Some(session) => self.with_addressed(session.peer(), session, now, both),
            None => self.with_current(now, both),
        };
        metadata.insert(TOKEN_KEY, token);
        metadata.insert(EXPIRES_KEY, expires);
    }

    fn with_addressed<T>(
        &self,
        audience: &SpiffeId,
        session: &Session,
        now: SystemTime,
        use_it: impl FnOnce(&Signed) -> T,
    ) -> T {
        let addressed = Addressed {
            peer: audience.clone(),
            generation: session.generation(),
            ends: session.ends(),
        };
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let signed = &mut state.of_sessions;
        if let Some(known) = signed.get(&addressed)
            && known.is_fresh(now)
        {
            return use_it(known);
        }
        if signed.len() >= MOST_TOKENS {
            signed.retain(|_, signed| signed.is_fresh(now));
        }
        if signed.len() >= MOST_TOKENS {
            signed.clear();
        }
        let claims = Claims {
            sub: session.svid().id().as_str(),
            aud: &[audience.to_string()],
            exp: 0,
        };
        let expires = session.ends().min(now + self.lifetime);
        let key = (Algorithm::ES256, session.svid().signing());
        let fresh = Signed::new(key, claims, now, expires);
        let used = use_it(&fresh);
        signed.insert(addressed, fresh);
        used
    }

    fn with_current<T>(&self, now: SystemTime, use_it: impl FnOnce(&Signed) -> T) -> T {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let State { key, current, .. } = &mut *state;
        match current {
            Some(signed) if signed.is_fresh(now) => use_it(signed),
            _ => {
                key.reload();
                use_it(current.insert(self.sign(key, now)))
            }
        }
    }

    fn sign(&self, key: &SigningKey, now: SystemTime) -> Signed {
        let claims = Claims {
            sub: &self.spiffe_id,
            aud: &self.audience,
            exp: 0,
        };
        let key = (key.algorithm, &key.encoding);
        Signed::new(key, claims, now, now + self.lifetime)
    }
}

impl fmt::Debug for TokenSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Never the key.
        f.debug_struct("TokenSource")
            .field("spiffe_id", &self.spiffe_id)
            .field("audience", &self.audience)
            .field("lifetime", &self.lifetime)
            .finish_non_exhaustive()
    }
}

impl Signed {
    /// A token of these claims, but for its end.
    fn new(
        (algorithm, key): (Algorithm, &EncodingKey),
        claims: Claims<'_>,
        now: SystemTime,
        expires: SystemTime,
    ) -> Self {
        let since_epoch = expires.duration_since(UNIX_EPOCH).unwrap_or_default();
        // `exp` counts whole seconds: rounded up, so that the token never dies before the time
        // that its metadata promises.
        let exp = since_epoch.as_secs() + u64::from(since_epoch.subsec_nanos() > 0);
        let claims = Claims { exp, ..claims };
        let token = jsonwebtoken::encode(&Header::new(algorithm), &claims, key)
            .expect("a key that was checked signs any claims that are plain JSON");
        Self {
            token: token.parse().expect("a JWT is base64url and dots"),
            expires_text: Timestamp::from(expires)
                .to_string()
                .parse()
                .expect("a time of RFC 3339 is ASCII"),
            issued: now,
            expires,
        }
    }

    fn token(&self) -> Token {
        let text = self.token.to_str().expect("a JWT is base64url and dots");
        Token {
            text: text.to_owned(),
            expires: self.expires,
        }
    }

    /// Whether the first half of the token's life is still running. A clock that was set back
    /// makes a token look as if it came from the future: such a token is not handed out either.
    fn is_fresh(&self, now: SystemTime) -> bool {
        let Ok(age) = now.duration_since(self.issued) else {
            return false;
        };
        let life = self.expires.duration_since(self.issued).unwrap_or_default();
        age < life / 2
    }
}

/// Reads the caller's token and its expiry from the metadata of a call.
///
/// Whether the token is still valid, and whether its signature is, is for the caller to decide.
///
/// # Errors
///
/// Either piece is missing, is not text, or the expiry is no time of RFC 3339.
pub fn read(metadata: &MetadataMap) -> Result<Token, TokenError> {
    let jwt = text(metadata, TOKEN_KEY)?;
    if jwt.is_empty() {
        return Err(TokenError::Empty);
    }
    let expires = text(metadata, EXPIRES_KEY)?;
    let time = Timestamp::from_str(expires)
        .ok()
        .and_then(|time| SystemTime::try_from(time).ok())
        .ok_or_else(|| TokenError::BadExpiry(expires.to_owned()))?;
    Ok(Token {
        text: jwt.to_owned(),
        expires: time,
    })
}

fn text<'m>(metadata: &'m MetadataMap, key: &'static str) -> Result<&'m str, TokenError> {
    metadata
        .get(key)
        .ok_or(TokenError::Missing(key))?
        .to_str()
        .map_err(|_| TokenError::NotText(key))
}

#[cfg(test)]
mod tests {
    use jsonwebtoken::{DecodingKey, Validation};
    use rustls::pki_types::PrivateKeyDer;
    use serde::Deserialize;

    use super::*;
    use crate::identity::{
        certificate::{Bundles, Leaf},
        source::Identity,
        svid::Svid,
    };

    const ID: &str = "spiffe://cluster-1.example/agent";
    const SECRET: &[u8] = b"insecure";
    const LIFETIME: Duration = Duration::from_secs(600);

    fn at(seconds: f64) -> SystemTime {
        UNIX_EPOCH + Duration::from_secs(1_800_000_000) + Duration::from_secs_f64(seconds)
    }

    #[derive(Deserialize)]
    struct Decoded {
        sub: String,
        aud: Option<Vec<String>>,
        exp: u64,
    }

    fn decode(token: &str) -> Decoded {
        let mut validation = Validation::new(Algorithm::HS256);
        validation.validate_aud = false;
        validation.validate_exp = false;
        jsonwebtoken::decode::<Decoded>(token, &DecodingKey::from_secret(SECRET), &validation)
            .unwrap()
            .claims
    }

    #[test]
    fn a_token_names_the_caller_and_expires() {
        let source = TokenSource::hs256(ID, SECRET, LIFETIME);
        let Token {
            text: token,
            expires,
        } = source.token(at(0.5));
        let claims = decode(&token);
        assert_eq!(claims.sub, ID);
        assert_eq!(claims.aud, None);
        assert_eq!(expires, at(600.5));
        // Whole seconds, never before the time that the metadata promises.
        assert_eq!(claims.exp, 1_800_000_601);
    }

    #[test]
    fn an_es256_token_is_checked_with_the_public_key() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("svid_key.pem");
        let write = |key: &rcgen::KeyPair| std::fs::write(&file, key.serialize_pem()).unwrap();
        let [first, second] = [(); 2].map(|()| rcgen::KeyPair::generate().unwrap());
        write(&first);
        let source = TokenSource::es256(ID, Es256Key::File(file.clone()), LIFETIME).unwrap();
        let check = |token: &str, key: &rcgen::KeyPair| {
            let mut validation = Validation::new(Algorithm::ES256);
            validation.validate_exp = false;
            let public = DecodingKey::from_ec_der(key.public_key_raw());
            jsonwebtoken::decode::<Decoded>(token, &public, &validation)
        };
        let token = source.token(at(0.0)).text;
        assert_eq!(check(&token, &first).unwrap().claims.sub, ID);
        assert!(check(&token, &second).is_err());
        // The key is rotated: the next token is signed with the new one.
        write(&second);
        let token = source.token(at(300.0)).text;
        assert_eq!(check(&token, &second).unwrap().claims.exp, 1_800_000_900);
        // A file that is being written leaves the key that was.
        std::fs::write(&file, "-----BEGIN").unwrap();
        assert!(check(&source.token(at(600.0)).text, &second).is_ok());
    }

    #[test]
    fn a_token_in_tls_is_for_the_other_end_and_of_the_certificate_that_it_has_seen() {
        let source = TokenSource::hs256(ID, SECRET, LIFETIME);
        let [first, second] = [(); 2].map(|()| session_of("nsc", "nsmgr", 3600));
        let now = SystemTime::now();
        let token = source.token_for(Some(&first), now);
        let mut validation = Validation::new(Algorithm::ES256);
        validation.set_audience(&["spiffe://one.example/nsmgr"]);
        let key = |session: &Session| {
            let leaf = Leaf::read(&session.svid().certified().cert[0]).unwrap();
            DecodingKey::from_ec_der(leaf.key.unwrap().point())
        };
        let decode = |key| jsonwebtoken::decode::<Decoded>(&token.text, &key, &validation);
        let claims = decode(key(&first)).unwrap().claims;
        assert_eq!(claims.sub, "spiffe://one.example/nsc");
        assert_eq!(claims.aud.map(|aud| aud.len()), Some(1));
        assert!(decode(key(&second)).is_err(), "another connection's key");
        assert_eq!(source.token_for(Some(&first), now), token);
        assert_eq!(token.expires, now + LIFETIME);
        // No longer than the certificates.
        let short = session_of("nsc", "nsmgr", 60);
        assert_eq!(source.token_for(Some(&short), now).expires, short.ends());
    }

    /// A connection from one id to another, of certificates with this life in seconds.
    fn session_of(own: &str, peer: &str, life: i64) -> Session {
        let authority = nsm_spiffe::Authority::of("one.example");
        let issued = [own, peer].map(|path| {
            authority.issue(&nsm_spiffe::Wanted {
                ends: life,
                ..nsm_spiffe::Wanted::of(&authority.id(path))
            })
        });
        let [own, peer] = issued;
        let key = PrivateKeyDer::try_from(own.key).unwrap();
        let chain = own.chain.into_iter().map(Into::into).collect();
        let identity = Identity::from_source("a test");
        identity.replace(Svid::new(chain, &key).unwrap(), Bundles::default());
        let leaf = Leaf::read(&peer.chain[0].clone().into()).unwrap();
        Session::new(identity.current().unwrap(), leaf, SystemTime::now())
    }

    #[test]
    fn a_generated_key_is_another_for_each() {
        let new = || TokenSource::es256(ID, Es256Key::Generated, LIFETIME).unwrap();
        assert_ne!(new().token(at(0.0)).text, new().token(at(0.0)).text);
    }

    #[test]
    fn an_audience_is_signed_in() {
        let source = TokenSource::hs256(ID, SECRET, LIFETIME)
            .with_audience(["spiffe://cluster-2.example/agent".to_owned()]);
        let claims = decode(&source.token(at(0.0)).text);
        assert_eq!(
            claims.aud.as_deref(),
            Some(&["spiffe://cluster-2.example/agent".to_owned()][..])
        );
    }

    #[test]
    fn a_token_is_kept_for_half_of_its_life() {
        let source = TokenSource::hs256(ID, SECRET, LIFETIME);
        let first = source.token(at(0.0));
        assert_eq!(source.token(at(299.0)), first);
        let second = source.token(at(300.0));
        assert_eq!(second.expires, at(900.0));
        assert_ne!(second.text, first.text);
        // A clock set back: the token from the future is not handed out.
        assert_eq!(source.token(at(200.0)).expires, at(800.0));
    }

    #[test]
    fn metadata_round_trip_keeps_the_nanoseconds() {
        let source = TokenSource::hs256(ID, SECRET, LIFETIME);
        let now = at(0.0) + Duration::from_nanos(123_456_789);
        let mut metadata = MetadataMap::new();
        metadata.insert(TOKEN_KEY, "stale".parse().unwrap());
        source.apply_at(now, None, &mut metadata);
        assert_eq!(
            metadata.get(EXPIRES_KEY).unwrap(),
            "2027-01-15T08:10:00.123456789Z"
        );
        assert_eq!(metadata.get_all(TOKEN_KEY).iter().count(), 1);
        let token = read(&metadata).unwrap();
        assert_eq!(token, source.token(now));
        assert_eq!(token.expires, now + LIFETIME);
    }

    #[test]
    fn what_go_writes_is_read() {
        let mut metadata = MetadataMap::new();
        metadata.insert(TOKEN_KEY, "t".parse().unwrap());
        for (text, expected) in [
            ("2027-01-15T08:00:00Z", at(0.0)),
            ("2027-01-15T10:00:00.5+02:00", at(0.5)),
            ("2027-01-15T02:30:00-05:30", at(0.0)),
        ] {
            metadata.insert(EXPIRES_KEY, text.parse().unwrap());
            assert_eq!(read(&metadata).unwrap().expires, expected, "{text}");
        }
    }

    #[test]
    fn missing_and_malformed_are_told_apart() {
        let mut metadata = MetadataMap::new();
        assert_eq!(read(&metadata), Err(TokenError::Missing(TOKEN_KEY)));
        metadata.insert(TOKEN_KEY, "".parse().unwrap());
        assert_eq!(read(&metadata), Err(TokenError::Empty));
        metadata.insert(TOKEN_KEY, "t".parse().unwrap());
        assert_eq!(read(&metadata), Err(TokenError::Missing(EXPIRES_KEY)));
        for bad in ["", "soon", "1800000000", "2027-13-01T00:00:00Z"] {
            metadata.insert(EXPIRES_KEY, bad.parse().unwrap());
            assert_eq!(
                read(&metadata),
                Err(TokenError::BadExpiry(bad.to_owned())),
                "{bad:?}"
            );
        }
        metadata.insert(
            TOKEN_KEY,
            MetadataValue::try_from(b"\xff\xfe".as_slice()).unwrap(),
        );
        assert_eq!(read(&metadata), Err(TokenError::NotText(TOKEN_KEY)));
    }

    #[test]
    fn debug_never_shows_the_secret() {
        let text = format!("{:?}", TokenSource::hs256(ID, SECRET, LIFETIME));
        assert!(text.contains(ID), "{text}");
        assert!(
            !text.contains("insecure") && !text.contains("105, 110"),
            "{text}"
        );
    }
}
