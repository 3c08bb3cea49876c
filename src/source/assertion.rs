//! Signed assertions of a client's identity: RFC 7523 section 2.2, as tightened by RFC 10070.

use std::{
    str::FromStr,
    time::{Duration, SystemTime},
};

use aws_lc_rs::{
    encoding::{AsDer, Pkcs8V1Der},
    rand, rsa,
    signature::{
        ECDSA_P256_SHA256_FIXED_SIGNING, ECDSA_P384_SHA384_FIXED_SIGNING, EcdsaKeyPair,
        EcdsaSigningAlgorithm, Ed25519KeyPair,
    },
};
use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};
use jsonwebtoken::{Algorithm, EncodingKey, Header, crypto::aws_lc};
use pkcs8::PrivateKeyInfoRef;
use rustls_pki_types::{PrivateKeyDer, pem::PemObject};
use secrecy::{ExposeSecret, SecretString};
use serde::{Deserialize, Serialize};
use zeroize::Zeroizing;

use super::{credential::Credential, response::Text, server::Endpoints};
use crate::{error::ConfigError, time::Now};

/// The algorithm that client assertions are signed with, by the names of RFC 7518 section 3.1 and RFC 8037
/// section 3.1.
///
/// It has to fit the key. Without [`signing_algorithm`](crate::ClientCredentialsBuilder::signing_algorithm) it is the
/// `alg` of a JWK, or else depends on the key: RS256, ES256, ES384 or EdDSA, and HS256 for a secret. If the server's
/// metadata name others, such as only PS256, one of those is used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum SigningAlgorithm {
    /// HMAC with SHA-256, with the client's secret.
    Hs256,
    /// HMAC with SHA-384, with the client's secret.
    Hs384,
    /// HMAC with SHA-512, with the client's secret.
    Hs512,
    /// RSASSA-PKCS1-v1_5 with SHA-256.
    Rs256,
    /// RSASSA-PKCS1-v1_5 with SHA-384, which health records servers ask for (SMART Backend Services).
    Rs384,
    /// RSASSA-PKCS1-v1_5 with SHA-512.
    Rs512,
    /// RSASSA-PSS with SHA-256.
    Ps256,
    /// RSASSA-PSS with SHA-384.
    Ps384,
    /// RSASSA-PSS with SHA-512.
    Ps512,
    /// ECDSA on the curve P-256 with SHA-256.
    Es256,
    /// ECDSA on the curve P-384 with SHA-384.
    Es384,
    /// Ed25519.
    EdDsa,
}

impl SigningAlgorithm {
    /// Whether this is its registered name.
    fn has_name(self, name: &str) -> bool {
        Algorithm::from_str(name).is_ok_and(|algorithm| algorithm == self.to_jose())
    }

    fn to_jose(self) -> Algorithm {
        match self {
            Self::Hs256 => Algorithm::HS256,
            Self::Hs384 => Algorithm::HS384,
            Self::Hs512 => Algorithm::HS512,
            Self::Rs256 => Algorithm::RS256,
            Self::Rs384 => Algorithm::RS384,
            Self::Rs512 => Algorithm::RS512,
            Self::Ps256 => Algorithm::PS256,
            Self::Ps384 => Algorithm::PS384,
            Self::Ps512 => Algorithm::PS512,
            Self::Es256 => Algorithm::ES256,
            Self::Es384 => Algorithm::ES384,
            Self::EdDsa => Algorithm::EdDSA,
        }
    }
}

/// Whom a client assertion is addressed to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum AssertionAudience {
    /// The issuer alone, in an assertion of the type `client-authentication+jwt`, as RFC 10070 requires.
    ///
    /// It needs [`issuer`](crate::ClientCredentialsBuilder::issuer), unless the server is
    /// [discovered](crate::ClientCredentials::discover).
    #[default]
    Issuer,
    /// The token endpoint, in an assertion of the type `JWT`: for servers that know only RFC 7523.
    ///
    /// Another server that this client talks to could pass such an assertion on as its own, so use it only for servers
    /// that refuse the other form.
    TokenEndpoint,
}

/// How assertions are made.
#[derive(Debug, Default)]
pub(super) struct Settings {
    pub(super) key_id: Option<String>,
    pub(super) thumbprint: Option<String>,
    pub(super) algorithm: Option<SigningAlgorithm>,
    pub(super) audience: AssertionAudience,
}

impl Settings {
    /// Rejects what cannot work, as far as that is known at build time. Without a private key, the secret signs.
    pub(super) fn check(
        &self,
        private_key: Option<&Credential>,
        endpoints: Option<&Endpoints>,
    ) -> Result<(), ConfigError> {
        let issuer_is_unknown = endpoints.is_some_and(|endpoints| endpoints.issuer.is_none());
        if issuer_is_unknown && self.audience == AssertionAudience::Issuer {
            return Err(ConfigError::new(
                "a client assertion is addressed to the issuer, which takes the setting issuer; \
                 AssertionAudience::TokenEndpoint is for older servers",
            ));
        }
        let Some(private_key) = private_key else {
            return Key::from_secret("")
                .algorithm(self.algorithm, None)
                .map(drop);
        };
        if let Some(text) = private_key.constant() {
            let key = Key::parse(text.expose_secret())?;
            let algorithm = key.algorithm(self.algorithm, None)?;
            return key.sign(&Header::new(algorithm.to_jose()), &()).map(drop);
        }
        // All that is known about a key that comes later.
        match self.algorithm {
            Some(algorithm) if HMAC.contains(&algorithm) => Err(ConfigError::new(
                "the signing_algorithm is for a secret and not for a private key",
            )),
            _ => Ok(()),
        }
    }

    /// Makes an assertion for one token request.
    pub(super) fn sign(
        &self,
        key: &Key,
        client_id: &str,
        endpoints: &Endpoints,
    ) -> Result<SecretString, ConfigError> {
        let algorithm = key.algorithm(self.algorithm, endpoints.algorithms.as_deref())?;
        let mut header = Header::new(algorithm.to_jose());
        let audience = match self.audience {
            AssertionAudience::TokenEndpoint => endpoints.token_url.as_str(),
            AssertionAudience::Issuer => {
                header.typ = Some("client-authentication+jwt".to_owned());
                let issuer = endpoints.issuer.as_deref();
                issuer.ok_or_else(|| ConfigError::new("the issuer is not known"))?
            }
        };
        header.kid = self.key_id.clone().or(key.id.clone());
        header.x5t_s256 = self.thumbprint.clone();
        let mut unique = [0; 16];
        rand::fill(&mut unique).map_err(|_| ConfigError::new("no random bytes are available"))?;
        let now = Now::read().wall.duration_since(SystemTime::UNIX_EPOCH);
        let now = now.unwrap_or_default();
        key.sign(
            &header,
            &Claims {
                iss: client_id,
                sub: client_id,
                aud: audience,
                jti: URL_SAFE_NO_PAD.encode(unique),
                iat: now.as_secs(),
                exp: (now + LIFETIME).as_secs(),
            },
        )
    }
}

#[derive(Serialize)]
struct Claims<'a> {
    iss: &'a str,
    sub: &'a str,
    // A string, not a list: by RFC 10070 servers refuse anything else.
    aud: &'a str,
    jti: String,
    iat: u64,
    exp: u64,
}

/// The key that signs assertions.
pub(super) struct Key {
    encoding: EncodingKey,
    /// The algorithms that it can be used with; the first is the default.
    algorithms: &'static [SigningAlgorithm],
    /// The `kid` and the `alg` of a JWK.
    id: Option<String>,
    own_algorithm: Option<SigningAlgorithm>,
}

impl Key {
    pub(super) fn from_secret(secret: &str) -> Self {
        Self::new(EncodingKey::from_secret(secret.as_bytes()), HMAC)
    }

    /// Reads a private key: a JWK, or PEM (PKCS#8, PKCS#1 or SEC 1).
    pub(super) fn parse(text: &str) -> Result<Self, ConfigError> {
        if text.trim_start().starts_with('{') {
            return Self::from_jwk(text);
        }
        // PEM errors quote the text they fail on.
        let der = PrivateKeyDer::from_pem_slice(text.as_bytes()).map_err(|_| {
            unusable("it is neither a JWK nor a private key in PEM without encryption")
        })?;
        match &der {
            PrivateKeyDer::Pkcs1(der) => {
                let pair = rsa::KeyPair::from_der(der.secret_pkcs1_der());
                Self::rsa(&pair.map_err(|_| unusable(RSA))?)
            }
            PrivateKeyDer::Sec1(der) => {
                let der = der.secret_sec1_der();
                let [p256, p384] = CURVES.map(|curve| {
                    EcdsaKeyPair::from_private_key_der(curve.signing, der)
                        .map_err(|_| unusable(EC))
                        .and_then(|pair| Self::ec(&pair, curve))
                });
                p256.or(p384)
            }
            PrivateKeyDer::Pkcs8(der) => Self::from_pkcs8(der.secret_pkcs8_der()),
            _ => Err(unusable("it is of an unknown form")),
        }
    }

    fn from_pkcs8(der: &[u8]) -> Result<Self, ConfigError> {
        if let Ok(pair) = rsa::KeyPair::from_pkcs8(der) {
            return Self::rsa(&pair);
        }
        if let Ok(pair) = Ed25519KeyPair::from_pkcs8_maybe_unchecked(der) {
            return Self::ed(&pair);
        }
        for curve in CURVES {
            if let Ok(pair) = EcdsaKeyPair::from_pkcs8(curve.signing, der) {
                return Self::ec(&pair, curve);
            }
        }
        Err(unusable(
            "it is neither RSA of 2048 to 8192 bits, nor P-256, P-384 or Ed25519",
        ))
    }

    fn from_jwk(json: &str) -> Result<Self, ConfigError> {
        // The error would quote the text it fails on.
        let jwk: Jwk = serde_json::from_str(json).map_err(|_| unusable("it is not a JWK"))?;
        let mut key = match (jwk.kty.get(), jwk.crv.get()) {
            (Some("RSA"), _) => {
                let (n, e) = (member(&jwk.n)?, member(&jwk.e)?);
                let pair = rsa::KeyPair::from_components(&rsa::KeyPairComponents {
                    public_key: rsa::PublicKeyComponents {
                        n: without_leading_zeros(&n),
                        e: without_leading_zeros(&e),
                    },
                    d: &**member(&jwk.d)?,
                    p: &**member(&jwk.p)?,
                    q: &**member(&jwk.q)?,
                    dP: &**member(&jwk.dp)?,
                    dQ: &**member(&jwk.dq)?,
                    qInv: &**member(&jwk.qi)?,
                });
                Self::rsa(&pair.map_err(|_| unusable(RSA))?)
            }
            (Some("EC"), Some(name)) => {
                let curve = CURVES.into_iter().find(|curve| curve.name == name);
                let curve = curve.ok_or_else(|| unusable("its curve is not supported"))?;
                // SEC 1 section 2.3.3: an uncompressed point.
                let point = [&[4][..], &member(&jwk.x)?, &member(&jwk.y)?].concat();
                let pair = EcdsaKeyPair::from_private_key_and_public_key(
                    curve.signing,
                    &member(&jwk.d)?,
                    &point,
                );
                Self::ec(&pair.map_err(|_| unusable(EC))?, curve)
            }
            (Some("OKP"), Some("Ed25519")) => {
                let pair =
                    Ed25519KeyPair::from_seed_and_public_key(&member(&jwk.d)?, &member(&jwk.x)?);
                Self::ed(&pair.map_err(|_| unusable("its parts do not fit together"))?)
            }
            _ => Err(unusable("its type is not supported")),
        }?;
        key.id = jwk.kid.get().map(str::to_owned);
        if let Some(name) = jwk.alg.get() {
            let known = key.algorithms.iter().find(|known| known.has_name(name));
            key.own_algorithm =
                Some(*known.ok_or_else(|| unusable("its alg is not supported or does not fit"))?);
        }
        Ok(key)
    }

    fn rsa(pair: &rsa::KeyPair) -> Result<Self, ConfigError> {
        // The signer wants the key inside PKCS#8.
        let der: Pkcs8V1Der<'_> = pair.as_der().map_err(|_| unusable(RSA))?;
        let inner = PrivateKeyInfoRef::try_from(der.as_ref()).map_err(|_| unusable(RSA))?;
        let encoding = EncodingKey::from_rsa_der(inner.private_key.as_bytes());
        Ok(Self::new(encoding, RSA_SIGNATURES))
    }

    fn ec(pair: &EcdsaKeyPair, curve: Curve) -> Result<Self, ConfigError> {
        let der = pair.to_pkcs8v1().map_err(|_| unusable(EC))?;
        Ok(Self::new(
            EncodingKey::from_ec_der(der.as_ref()),
            curve.algorithms,
        ))
    }

    fn ed(pair: &Ed25519KeyPair) -> Result<Self, ConfigError> {
        let der = pair
            .to_pkcs8()
            .map_err(|_| unusable("it cannot be written"))?;
        let algorithms = &[SigningAlgorithm::EdDsa];
        Ok(Self::new(
            EncodingKey::from_ed_der(der.as_ref()),
            algorithms,
        ))
    }

    fn new(encoding: EncodingKey, algorithms: &'static [SigningAlgorithm]) -> Self {
        Self {
            encoding,
            algorithms,
            id: None,
            own_algorithm: None,
        }
    }

    fn algorithm(
        &self,
        configured: Option<SigningAlgorithm>,
        supported: Option<&[String]>,
    ) -> Result<SigningAlgorithm, ConfigError> {
        if let Some(algorithm) = configured {
            if self.algorithms.contains(&algorithm) {
                return Ok(algorithm);
            }
            return Err(unusable("it is not for the signing_algorithm"));
        }
        if let Some(algorithm) = self.own_algorithm {
            return Ok(algorithm);
        }
        let is_supported = |algorithm: &&SigningAlgorithm| {
            supported.is_none_or(|names| names.iter().any(|name| algorithm.has_name(name)))
        };
        // The metadata of a server that names none of them may be wrong.
        let supported = self.algorithms.iter().find(is_supported);
        Ok(*supported.unwrap_or(&self.algorithms[0]))
    }

    /// Writes a JWS in its compact form (RFC 7515 section 7.1).
    ///
    /// Not with `jsonwebtoken::encode`, which uses the backend of the process: choosing it is up to the application,
    /// and with two of them compiled in and none chosen, it panics.
    fn sign(&self, header: &Header, claims: &impl Serialize) -> Result<SecretString, ConfigError> {
        let signer = (aws_lc::DEFAULT_PROVIDER.signer_factory)(&header.alg, &self.encoding)
            .map_err(|_| unusable("the signer refuses it"))?;
        let [header, claims] = [serde_json::to_vec(header), serde_json::to_vec(claims)]
            .map(|json| URL_SAFE_NO_PAD.encode(json.expect("it is plain data")));
        let message = format!("{header}.{claims}");
        let signature = signer
            .try_sign(message.as_bytes())
            .map_err(|_| unusable("the signer fails with it"))?;
        let signature = URL_SAFE_NO_PAD.encode(signature);
        Ok(format!("{message}.{signature}").into())
    }
}

/// The members of a private JWK (RFC 7518 section 6, RFC 8037 section 2).
#[derive(Default, Deserialize)]
#[serde(default)]
struct Jwk {
    kty: Text,
    kid: Text,
    alg: Text,
    crv: Text,
    x: Text,
    y: Text,
    n: Text,
    e: Text,
    d: Text,
    p: Text,
    q: Text,
    dp: Text,
    dq: Text,
    qi: Text,
}

fn member(text: &Text) -> Result<Zeroizing<Vec<u8>>, ConfigError> {
    let bytes = text
        .get()
        .and_then(|text| URL_SAFE_NO_PAD.decode(text).ok());
    bytes
        .map(Zeroizing::new)
        .ok_or_else(|| unusable("a member that its type takes is missing or is not base64url"))
}

/// RFC 7518 section 2 allows none of them in an integer, and the parser rejects them.
fn without_leading_zeros(mut number: &[u8]) -> &[u8] {
    while let [0, rest @ ..] = number {
        number = rest;
    }
    number
}

#[derive(Clone, Copy)]
struct Curve {
    name: &'static str,
    signing: &'static EcdsaSigningAlgorithm,
    algorithms: &'static [SigningAlgorithm],
}

const CURVES: [Curve; 2] = [
    Curve {
        name: "P-256",
        signing: &ECDSA_P256_SHA256_FIXED_SIGNING,
        algorithms: &[SigningAlgorithm::Es256],
    },
    Curve {
        name: "P-384",
        signing: &ECDSA_P384_SHA384_FIXED_SIGNING,
        algorithms: &[SigningAlgorithm::Es384],
    },
];

const RSA_SIGNATURES: &[SigningAlgorithm] = &[
    SigningAlgorithm::Rs256,
    SigningAlgorithm::Ps256,
    SigningAlgorithm::Rs384,
    SigningAlgorithm::Ps384,
    SigningAlgorithm::Rs512,
    SigningAlgorithm::Ps512,
];

const HMAC: &[SigningAlgorithm] = &[
    SigningAlgorithm::Hs256,
    SigningAlgorithm::Hs384,
    SigningAlgorithm::Hs512,
];

fn unusable(why: &str) -> ConfigError {
    ConfigError::new(format!("the client's key cannot be used: {why}"))
}

const RSA: &str = "it is no RSA key of 2048 to 8192 bits";

const EC: &str = "it is no key of the curves P-256 and P-384";

/// The registered name of RFC 7523 section 2.2.
pub(super) const TYPE: &str = "urn:ietf:params:oauth:client-assertion-type:jwt-bearer";

/// How long an assertion is valid: it is used at once, but clocks differ.
const LIFETIME: Duration = Duration::from_secs(60);

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use aws_lc_rs::{
        encoding::{Curve25519SeedBin, EcPrivateKeyBin, EcPrivateKeyRfc5915Der},
        signature::KeyPair,
    };
    use base64::engine::general_purpose::STANDARD;
    use jsonwebtoken::{DecodingKey, Validation};
    use oauth2::TokenUrl;
    use serde_json::{Value, json};

    use super::*;

    const ISSUER: &str = "https://as.example";

    fn endpoints(algorithms: Option<&[&str]>) -> Endpoints {
        Endpoints {
            token_url: TokenUrl::new("https://as.example/token".to_owned()).unwrap(),
            revocation_url: None,
            issuer: Some(ISSUER.to_owned()),
            auth_methods: None,
            algorithms: algorithms.map(|names| names.iter().map(|&name| name.into()).collect()),
        }
    }

    fn pem(label: &str, der: &[u8]) -> String {
        let text = STANDARD.encode(der);
        let lines: Vec<_> = text
            .as_bytes()
            .chunks(64)
            .map(String::from_utf8_lossy)
            .collect();
        let lines = lines.join("\n");
        format!("-----BEGIN {label}-----\n{lines}\n-----END {label}-----\n")
    }

    fn base64url(bytes: &[u8]) -> String {
        URL_SAFE_NO_PAD.encode(bytes)
    }

    /// Verifies a signed assertion, and returns its header and claims.
    fn verified(
        assertion: &SecretString,
        algorithm: Algorithm,
        key: &DecodingKey,
    ) -> (Header, Value) {
        let mut validation = Validation::new(algorithm);
        validation.set_audience(&[ISSUER, "https://as.example/token"]);
        validation.set_required_spec_claims(&["exp", "aud", "iss", "sub"]);
        let text = assertion.expose_secret();
        let data = jsonwebtoken::decode::<Value>(text, key, &validation).unwrap();
        (data.header, data.claims)
    }

    /// An RSA key as PKCS#8, PKCS#1 and JWK.
    fn rsa_key() -> (rsa::KeyPair, [String; 3]) {
        let pair = rsa::KeyPair::generate(rsa::KeySize::Rsa2048).unwrap();
        let der: Pkcs8V1Der<'_> = pair.as_der().unwrap();
        let inner = PrivateKeyInfoRef::try_from(der.as_ref()).unwrap();
        let pkcs1 = inner.private_key.as_bytes();
        // RFC 8017 appendix A.1.2: a sequence of integers, the first being the version.
        let mut rest = &pkcs1[4..];
        let mut integers = Vec::new();
        while let [2, length, tail @ ..] = rest {
            let (length, tail) = match length {
                0x81 => (tail[0] as usize, &tail[1..]),
                0x82 => (usize::from(tail[0]) << 8 | usize::from(tail[1]), &tail[2..]),
                short => (usize::from(*short), tail),
            };
            integers.push(base64url(without_leading_zeros(&tail[..length])));
            rest = &tail[length..];
        }
        let names = ["n", "e", "d", "p", "q", "dp", "dq", "qi"];
        let members = names.into_iter().zip(&integers[1..]);
        let mut jwk: HashMap<_, _> = members
            .map(|(name, value)| (name, value.as_str()))
            .collect();
        jwk.insert("kty", "RSA");
        let jwk = serde_json::to_string(&jwk).unwrap();
        let texts = [
            pem("PRIVATE KEY", der.as_ref()),
            pem("RSA PRIVATE KEY", pkcs1),
            jwk,
        ];
        (pair, texts)
    }

    fn ec_key(curve: Curve, size: usize) -> (EcdsaKeyPair, [String; 3]) {
        let pair = EcdsaKeyPair::generate(curve.signing).unwrap();
        let sec1: EcPrivateKeyRfc5915Der<'_> = pair.private_key().as_der().unwrap();
        let secret: EcPrivateKeyBin<'_> =
            aws_lc_rs::encoding::AsBigEndian::as_be_bytes(&pair.private_key()).unwrap();
        let point = pair.public_key().as_ref();
        let jwk = json!({
            "kty": "EC",
            "crv": curve.name,
            "d": base64url(secret.as_ref()),
            "x": base64url(&point[1..=size]),
            "y": base64url(&point[size + 1..]),
        });
        let texts = [
            pem("PRIVATE KEY", pair.to_pkcs8v1().unwrap().as_ref()),
            pem("EC PRIVATE KEY", sec1.as_ref()),
            jwk.to_string(),
        ];
        (pair, texts)
    }

    fn ed_key() -> (Ed25519KeyPair, [String; 3]) {
        let pair = Ed25519KeyPair::generate().unwrap();
        let seed: Curve25519SeedBin<'_> =
            aws_lc_rs::encoding::AsBigEndian::as_be_bytes(&pair.seed().unwrap()).unwrap();
        let jwk = json!({
            "kty": "OKP",
            "crv": "Ed25519",
            "d": base64url(seed.as_ref()),
            "x": base64url(pair.public_key().as_ref()),
        });
        let texts = [
            // As ring and aws-lc-rs write them, and as openssl does: RFC 5958 and RFC 5208.
            pem("PRIVATE KEY", pair.to_pkcs8().unwrap().as_ref()),
            pem("PRIVATE KEY", pair.to_pkcs8v1().unwrap().as_ref()),
            jwk.to_string(),
        ];
        (pair, texts)
    }

    #[test]
    fn every_kind_of_key_signs_in_every_form() {
        let (rsa, rsa_texts) = rsa_key();
        let (p256, p256_texts) = ec_key(CURVES[0], 32);
        let (p384, p384_texts) = ec_key(CURVES[1], 48);
        let (ed, ed_texts) = ed_key();
        let rsa = DecodingKey::from_rsa_der(rsa.public_key().as_ref());
        let p256 = DecodingKey::from_ec_der(p256.public_key().as_ref());
        let p384 = DecodingKey::from_ec_der(p384.public_key().as_ref());
        let ed = DecodingKey::from_ed_der(ed.public_key().as_ref());
        let of_rsa = [
            (None, Algorithm::RS256),
            (Some(SigningAlgorithm::Rs256), Algorithm::RS256),
            (Some(SigningAlgorithm::Rs384), Algorithm::RS384),
            (Some(SigningAlgorithm::Rs512), Algorithm::RS512),
            (Some(SigningAlgorithm::Ps256), Algorithm::PS256),
            (Some(SigningAlgorithm::Ps384), Algorithm::PS384),
            (Some(SigningAlgorithm::Ps512), Algorithm::PS512),
        ]
        .map(|(configured, expected)| (&rsa_texts, &rsa, configured, expected));
        let of_curves = [
            (&p256_texts, &p256, None, Algorithm::ES256),
            (&p384_texts, &p384, None, Algorithm::ES384),
            (&ed_texts, &ed, None, Algorithm::EdDSA),
        ];
        for (texts, key, configured, expected) in of_rsa.into_iter().chain(of_curves) {
            for text in texts {
                let settings = Settings {
                    algorithm: configured,
                    ..Settings::default()
                };
                let assertion = settings
                    .sign(&Key::parse(text).unwrap(), "id", &endpoints(None))
                    .unwrap();
                verified(&assertion, expected, key);
            }
        }
    }

    #[test]
    fn a_secret_signs_with_hmac() {
        for (configured, supported, expected) in [
            (None, None, Algorithm::HS256),
            (None, Some(&["HS512", "RS256"][..]), Algorithm::HS512),
            (None, Some(&["RS256"][..]), Algorithm::HS256),
            (Some(SigningAlgorithm::Hs384), None, Algorithm::HS384),
        ] {
            let settings = Settings {
                algorithm: configured,
                ..Settings::default()
            };
            let endpoints = endpoints(supported);
            let assertion = settings
                .sign(&Key::from_secret("secret"), "id", &endpoints)
                .unwrap();
            verified(&assertion, expected, &DecodingKey::from_secret(b"secret"));
        }
    }

    /// RFC 7523 section 3 and RFC 10070.
    #[test]
    fn an_assertion_is_addressed_to_the_issuer_alone_and_is_unique() {
        let (pair, [text, ..]) = ec_key(CURVES[0], 32);
        let key = DecodingKey::from_ec_der(pair.public_key().as_ref());
        let settings = Settings {
            key_id: Some("k1".to_owned()),
            thumbprint: Some("x5t".to_owned()),
            ..Settings::default()
        };
        let mut seen = Vec::new();
        for _ in 0..2 {
            let assertion = settings
                .sign(&Key::parse(&text).unwrap(), "id", &endpoints(None))
                .unwrap();
            let (header, claims) = verified(&assertion, Algorithm::ES256, &key);
            assert_eq!(header.typ.as_deref(), Some("client-authentication+jwt"));
            assert_eq!(header.kid.as_deref(), Some("k1"));
            assert_eq!(header.x5t_s256.as_deref(), Some("x5t"));
            assert_eq!(claims["iss"], "id");
            assert_eq!(claims["sub"], "id");
            assert_eq!(claims["aud"], ISSUER);
            let now = jsonwebtoken::get_current_timestamp();
            let (iat, exp) = (
                claims["iat"].as_u64().unwrap(),
                claims["exp"].as_u64().unwrap(),
            );
            assert!(iat.abs_diff(now) <= 5 && exp == iat + 60, "{claims}");
            seen.push(claims["jti"].as_str().unwrap().to_owned());
        }
        assert_ne!(seen[0], seen[1]);
        assert!(seen[0].len() >= 22);
    }

    #[test]
    fn an_older_server_gets_its_token_endpoint_as_the_audience() {
        let settings = Settings {
            audience: AssertionAudience::TokenEndpoint,
            ..Settings::default()
        };
        let mut endpoints = endpoints(None);
        endpoints.issuer = None;
        settings.check(None, Some(&endpoints)).unwrap();
        let assertion = settings
            .sign(&Key::from_secret("secret"), "id", &endpoints)
            .unwrap();
        let key = DecodingKey::from_secret(b"secret");
        let (header, claims) = verified(&assertion, Algorithm::HS256, &key);
        assert_eq!(header.typ.as_deref(), Some("JWT"));
        assert_eq!(claims["aud"], "https://as.example/token");
    }

    #[test]
    fn the_kid_and_alg_of_a_jwk_are_used() {
        let (pair, [.., jwk]) = rsa_key();
        let key = DecodingKey::from_rsa_der(pair.public_key().as_ref());
        let jwk = jwk.replacen('{', r#"{"kid":"of-jwk","alg":"PS256","#, 1);
        let assertion = Settings::default().sign(
            &Key::parse(&jwk).unwrap(),
            "id",
            &endpoints(Some(&["RS256"])),
        );
        let (header, _) = verified(&assertion.unwrap(), Algorithm::PS256, &key);
        assert_eq!(header.kid.as_deref(), Some("of-jwk"));
    }

    /// Open banking names PS256 and no RS256, and SMART Backend Services the second list.
    #[test]
    fn a_server_that_wants_another_rsa_signature_gets_it() {
        let (pair, [text, ..]) = rsa_key();
        let key = DecodingKey::from_rsa_der(pair.public_key().as_ref());
        for (supported, expected) in [
            (&["ES256", "PS256"], Algorithm::PS256),
            (&["RS384", "ES384"], Algorithm::RS384),
        ] {
            let endpoints = endpoints(Some(supported));
            let assertion = Settings::default().sign(&Key::parse(&text).unwrap(), "id", &endpoints);
            verified(&assertion.unwrap(), expected, &key);
        }
    }

    #[test]
    fn keys_that_cannot_be_used_are_refused_without_showing_them() {
        let (_, [pem_text, _, jwk]) = ec_key(CURVES[0], 32);
        let other: Value = serde_json::from_str(&ec_key(CURVES[0], 32).1[2]).unwrap();
        let mut mixed: Value = serde_json::from_str(&jwk).unwrap();
        mixed["x"] = other["x"].clone();
        for text in [
            "CANARY".to_owned(),
            String::new(),
            "{\"kty\":\"CANARY\"}".to_owned(),
            "{\"kty\":\"EC\",\"crv\":\"P-256\",\"d\":\"CANARY!\"}".to_owned(),
            "{CANARY".to_owned(),
            mixed.to_string(),
            jwk.replacen('{', r#"{"alg":"CANARY","#, 1),
            jwk.replacen('{', r#"{"alg":"RS256","#, 1),
            jwk.replace("P-256", "P-521"),
            pem_text.replace("PRIVATE", "PUBLIC"),
            "-----BEGIN PRIVATE KEY-----\nCANARY\n-----END PRIVATE KEY-----\n".to_owned(),
            "-----BEGIN RSA PRIVATE KEY-----\nAAAA\n-----END RSA PRIVATE KEY-----\n".to_owned(),
        ] {
            let settings = Settings::default();
            let key = Credential::from(text.as_str());
            let error = settings.check(Some(&key), Some(&endpoints(None)));
            let error = error.unwrap_err();
            assert!(!format!("{error:?}").contains("CANARY"), "{error:?}");
            assert!(
                Key::parse(&text)
                    .and_then(|key| settings.sign(&key, "id", &endpoints(None)))
                    .is_err()
            );
        }
        // It is PEM all the same.
        let encrypted = pem_text.replace("PRIVATE", "ENCRYPTED PRIVATE");
        let problem = Key::parse(&encrypted).err().unwrap().to_string();
        assert!(problem.contains("in PEM without encryption"), "{problem}");
        let key = Credential::from(pem_text.as_str());
        for (key, algorithm) in [
            (Some(&key), SigningAlgorithm::Rs256),
            (Some(&key), SigningAlgorithm::Hs256),
            (None, SigningAlgorithm::Es256),
        ] {
            let settings = Settings {
                algorithm: Some(algorithm),
                ..Settings::default()
            };
            let checked = settings.check(key, Some(&endpoints(None)));
            assert!(checked.is_err(), "{algorithm:?}");
        }
    }
}
