//! One-time tokens: a request waits here, between the CRI call that answers with its URL and the client that
//! comes to the URL.

use std::collections::{HashMap, VecDeque};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use tokio::time::Instant;

/// Random bytes of a token; it is all that lets a client in.
const TOKEN_BYTES: usize = 16;

pub(crate) struct Tokens<T> {
    lifetime: Duration,
    most: usize,
    waiting: Mutex<Waiting<T>>,
}

struct Waiting<T> {
    requests: HashMap<String, (Instant, T)>,
    /// Oldest first. Holds tokens that are used up too, until their time.
    order: VecDeque<(Instant, String)>,
}

impl<T> Tokens<T> {
    pub(crate) fn new(lifetime: Duration, most: usize) -> Tokens<T> {
        let waiting = Waiting {
            requests: HashMap::new(),
            order: VecDeque::new(),
        };
        Tokens {
            lifetime,
            most,
            waiting: Mutex::new(waiting),
        }
    }

    /// The token of a request; `None` where too many wait already.
    pub(crate) fn insert(&self, request: T) -> Option<String> {
        self.insert_at(Instant::now(), request)
    }

    fn insert_at(&self, now: Instant, request: T) -> Option<String> {
        let token = URL_SAFE_NO_PAD.encode(rand::random::<[u8; TOKEN_BYTES]>());
        let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        waiting.expire(now);
        // By `order`, so that insert and take in turn cannot grow it.
        if waiting.order.len() >= self.most {
            if waiting.requests.len() == waiting.order.len() {
                return None;
            }
            waiting.compact();
        }
        let end = now + self.lifetime;
        waiting.requests.insert(token.clone(), (end, request));
        waiting.order.push_back((end, token.clone()));
        Some(token)
    }

    /// The request of a token, once and in time, if `accept` says that it is the one.
    pub(crate) fn take(&self, token: &str, accept: impl FnOnce(&T) -> bool) -> Option<T> {
        self.take_at(Instant::now(), token, accept)
    }

    fn take_at(&self, now: Instant, token: &str, accept: impl FnOnce(&T) -> bool) -> Option<T> {
        let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        waiting.expire(now);
        let (_, request) = waiting.requests.get(token)?;
        if !accept(request) {
            return None;
        }
        waiting.requests.remove(token).map(|(_, request)| request)
    }
}

impl<T> Waiting<T> {
    fn expire(&mut self, now: Instant) {
        while self.order.front().is_some_and(|(end, _)| *end <= now) {
            if let Some((_, token)) = self.order.pop_front() {
                self.requests.remove(&token);
            }
        }
    }

    fn compact(&mut self) {
        let requests = &self.requests;
        self.order.retain(|(_, token)| requests.contains_key(token));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn once_and_in_time() {
        let tokens = Tokens::new(Duration::from_secs(60), 3);
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        let one = tokens.insert_at(at(0), 1).expect("room");
        assert_eq!(one.len(), 22);
        assert_eq!(tokens.take_at(at(1), &one, |_| false), None);
        assert_eq!(tokens.take_at(at(1), &one, |_| true), Some(1));
        assert_eq!(tokens.take_at(at(1), &one, |_| true), None);
        assert_eq!(tokens.take_at(at(1), "", |_| true), None);

        let two = tokens.insert_at(at(0), 2).expect("room");
        let three = tokens.insert_at(at(59), 3).expect("room");
        assert_eq!(tokens.take_at(at(60), &two, |_| true), None);
        assert_eq!(tokens.take_at(at(60), &three, |_| true), Some(3));
    }

    #[test]
    fn bounded() {
        let tokens = Tokens::new(Duration::from_secs(60), 3);
        let all: Vec<String> = (0..3).filter_map(|n| tokens.insert(n)).collect();
        assert_eq!(all.len(), 3);
        assert_eq!(tokens.insert(9), None);
        assert_eq!(tokens.take(&all[1], |_| true), Some(1));
        assert!(tokens.insert(9).is_some());
        assert_eq!(tokens.insert(9), None);
        let later = Instant::now() + Duration::from_secs(60);
        assert!(tokens.insert_at(later, 9).is_some());
        // Used tokens do not pile up.
        for n in 0..1000 {
            let token = tokens.insert_at(later, n).expect("room");
            assert_eq!(tokens.take_at(later, &token, |_| true), Some(n));
        }
        assert!(tokens.waiting.lock().expect("lock").order.len() <= 3);
    }
}
