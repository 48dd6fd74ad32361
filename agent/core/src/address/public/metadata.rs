//! The metadata services of clouds: the question to each, and the meaning of its answers.
//!
//! All four are plain HTTP of the vendors' own making, without a common protocol: AWS wants a session token first (IMDSv2), Google and
//! Azure a header that no browser sends along, Equinix Metal nothing. The answer for a machine without a public address is 404 (AWS,
//! Google, Equinix Metal) or by an empty body (Azure, and Google for an access config without an address).

use std::{fmt, net::IpAddr, str::FromStr};

use serde::Deserialize;

/// A cloud with a supported metadata service.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Provider {
    /// Amazon EC2, by IMDSv2.
    Aws,
    /// Google Compute Engine.
    Gcp,
    /// Equinix Metal.
    Equinix,
    /// Microsoft Azure.
    Azure,
}

/// One HTTP GET.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Question {
    /// Path and query.
    pub path: &'static str,
    /// A header that the service demands.
    pub header: Option<(&'static str, &'static str)>,
}

/// Why an answer cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum AnswerError {
    /// A status that means a fault or a refusal.
    #[error("it answered {status}: {}", hint(*.status))]
    Status {
        /// The HTTP status.
        status: u16,
    },
    /// The body is no address.
    #[error("it answered {0:?}, which is no IP address: is another service listening there?")]
    NoAddress(String),
    /// The body is no JSON of the service's form.
    #[error("its answer is not what the service sends: {0}")]
    Form(String),
    /// The answer is not the provider's.
    #[error("its answer lacks the header `{0}` that {1} sends: another service is listening there")]
    NotTheService(&'static str, Provider),
}

/// Where AWS gives a token, by PUT.
pub const AWS_TOKEN_PATH: &str = "/latest/api/token";

/// How long AWS's token shall live; the most that it grants, so that most rounds need one request.
pub const AWS_TOKEN_LIFETIME: (&str, &str) = ("x-aws-ec2-metadata-token-ttl-seconds", "21600");

/// The header that carries AWS's token.
pub const AWS_TOKEN_HEADER: &str = "x-aws-ec2-metadata-token";

/// The header that Google's service sends with every answer, and wants with every question.
const GCP_FLAVOR: (&str, &str) = ("metadata-flavor", "Google");

/// Azure's instance metadata leaves the address of a Standard load balancer or public IP out; it is here.
pub const AZURE_LOAD_BALANCER: Question = Question {
    path: "/metadata/loadbalancer?api-version=2020-10-01",
    header: Some(("metadata", "true")),
};

/// The longest text that is repeated in an error.
const SHOWN: usize = 64;

impl Provider {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::Aws, Self::Gcp, Self::Equinix, Self::Azure];

    /// Where its service is.
    #[must_use]
    pub fn base_url(self) -> &'static str {
        match self {
            Self::Aws | Self::Gcp | Self::Azure => "http://169.254.169.254",
            Self::Equinix => "https://metadata.platformequinix.com",
        }
    }

    /// The question for the public IPv4 address. AWS wants [`AWS_TOKEN_HEADER`] besides.
    #[must_use]
    pub fn question(self) -> Question {
        match self {
            Self::Aws => Question {
                path: "/latest/meta-data/public-ipv4",
                header: None,
            },
            Self::Gcp => Question {
                path: "/computeMetadata/v1/instance/network-interfaces/0/access-configs/0/external-ip",
                header: Some(GCP_FLAVOR),
            },
            Self::Equinix => Question {
                path: "/2009-04-04/meta-data/public-ipv4",
                header: None,
            },
            Self::Azure => Question {
                path: "/metadata/instance/network/interface/0/ipv4/ipAddress/0/publicIpAddress?api-version=2021-02-01&format=text",
                header: Some(("metadata", "true")),
            },
        }
    }

    /// Reads the answer; `header` gives the value of one of its headers.
    ///
    /// # Errors
    /// When it is a refusal, no address, or not that service's.
    pub fn read<'a>(
        self,
        status: u16,
        header: impl Fn(&str) -> Option<&'a str>,
        body: &str,
    ) -> Result<Option<IpAddr>, AnswerError> {
        if self == Self::Gcp && header(GCP_FLAVOR.0) != Some(GCP_FLAVOR.1) {
            return Err(AnswerError::NotTheService(GCP_FLAVOR.0, self));
        }
        match status {
            200 => {}
            404 => return Ok(None),
            status => return Err(AnswerError::Status { status }),
        }
        match body.trim() {
            "" => Ok(None),
            text => address(text).map(Some),
        }
    }
}

/// Azure's answer about the addresses before this machine.
#[derive(Debug, Deserialize)]
struct LoadBalancers {
    loadbalancer: LoadBalancer,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct LoadBalancer {
    #[serde(default)]
    public_ip_addresses: Vec<FrontendIp>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct FrontendIp {
    #[serde(default)]
    frontend_ip_address: String,
}

/// Reads the answer to [`AZURE_LOAD_BALANCER`]: the first address. A machine without any has an answer of 400 or 404.
///
/// # Errors
/// When it is a refusal, or not of the service's form.
pub fn front_of_load_balancer(status: u16, body: &str) -> Result<Option<IpAddr>, AnswerError> {
    match status {
        200 => {}
        400 | 404 => return Ok(None),
        status => return Err(AnswerError::Status { status }),
    }
    let answer: LoadBalancers =
        serde_json::from_str(body).map_err(|error| AnswerError::Form(error.to_string()))?;
    let first = answer.loadbalancer.public_ip_addresses.first();
    first.map(|ip| address(&ip.frontend_ip_address)).transpose()
}

fn address(text: &str) -> Result<IpAddr, AnswerError> {
    text.parse()
        .map_err(|_| AnswerError::NoAddress(text.chars().take(SHOWN).collect()))
}

fn hint(status: u16) -> &'static str {
    match status {
        401 => "the session token is not valid (any more)",
        403 => "the metadata service is switched off for this machine, or a proxy stands before it",
        429 => "too many questions from this machine",
        500.. => "the service is out of order",
        _ => "another service is listening there",
    }
}

impl fmt::Display for Provider {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Aws => "AWS",
            Self::Gcp => "GCP",
            Self::Equinix => "Equinix Metal",
            Self::Azure => "Azure",
        })
    }
}

impl FromStr for Provider {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, &'static str> {
        match text {
            "aws" => Ok(Self::Aws),
            "gcp" => Ok(Self::Gcp),
            "equinix" => Ok(Self::Equinix),
            "azure" => Ok(Self::Azure),
            _ => Err("aws, gcp, equinix or azure"),
        }
    }
}
