//! One question to a cloud's metadata service.

use std::{
    net::IpAddr,
    sync::{Mutex, PoisonError},
};

use ::http::{Method, StatusCode};
use nsm_core::address::public::{
    Provider,
    metadata::{
        AWS_TOKEN_HEADER, AWS_TOKEN_LIFETIME, AWS_TOKEN_PATH, AZURE_LOAD_BALANCER, AnswerError,
        Question, front_of_load_balancer,
    },
};

use super::{
    LookupError,
    http::{Answer, BaseUrl, Trust},
};

pub(super) async fn ask(
    provider: Provider,
    base: &BaseUrl,
    trust: &Trust,
    aws_token: &Mutex<Option<String>>,
) -> Result<Option<IpAddr>, LookupError> {
    let question = provider.question();
    if provider == Provider::Aws {
        return ask_aws(base, question, trust, aws_token).await;
    }
    let answer = get(base, question, None, trust).await?;
    match read(provider, base, question, &answer)? {
        None if provider == Provider::Azure => {
            let answer = get(base, AZURE_LOAD_BALANCER, None, trust).await?;
            front_of_load_balancer(answer.status.as_u16(), &answer.body)
                .map_err(|error| wrong(base, AZURE_LOAD_BALANCER.path, error))
        }
        found => Ok(found),
    }
}

/// With a session token, which is kept; a new one when the service does not take it any more.
async fn ask_aws(
    base: &BaseUrl,
    question: Question,
    trust: &Trust,
    kept: &Mutex<Option<String>>,
) -> Result<Option<IpAddr>, LookupError> {
    let held = kept.lock().unwrap_or_else(PoisonError::into_inner).take();
    if let Some(token) = held {
        let answer = get(base, question, Some(&token), trust).await?;
        if answer.status != StatusCode::UNAUTHORIZED {
            *kept.lock().unwrap_or_else(PoisonError::into_inner) = Some(token);
            return read(Provider::Aws, base, question, &answer);
        }
    }
    let token = base
        .exchange(Method::PUT, AWS_TOKEN_PATH, &[AWS_TOKEN_LIFETIME], trust)
        .await?;
    if token.status != StatusCode::OK {
        let cause = AnswerError::Status {
            status: token.status.as_u16(),
        };
        return Err(wrong(base, AWS_TOKEN_PATH, cause));
    }
    let token = token.body.trim();
    let answer = get(base, question, Some(token), trust).await?;
    if answer.status != StatusCode::UNAUTHORIZED {
        *kept.lock().unwrap_or_else(PoisonError::into_inner) = Some(token.to_owned());
    }
    read(Provider::Aws, base, question, &answer)
}

async fn get(
    base: &BaseUrl,
    question: Question,
    aws_token: Option<&str>,
    trust: &Trust,
) -> Result<Answer, LookupError> {
    let token = aws_token.map(|token| (AWS_TOKEN_HEADER, token));
    let headers: Vec<(&str, &str)> = question.header.into_iter().chain(token).collect();
    base.exchange(Method::GET, question.path, &headers, trust)
        .await
}

fn read(
    provider: Provider,
    base: &BaseUrl,
    question: Question,
    answer: &Answer,
) -> Result<Option<IpAddr>, LookupError> {
    provider
        .read(
            answer.status.as_u16(),
            |name| answer.header(name),
            &answer.body,
        )
        .map_err(|error| wrong(base, question.path, error))
}

fn wrong(base: &BaseUrl, path: &str, cause: impl ToString) -> LookupError {
    LookupError::Answer {
        url: base.at(path),
        cause: cause.to_string(),
    }
}
