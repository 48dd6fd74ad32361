//! Which slots of COUNTERS are free.

use std::collections::VecDeque;

/// Hands out slots below a bound: those never used first, then the one that was freed longest ago.
#[derive(Debug)]
pub(super) struct Slots {
    /// From here on, no slot was ever used.
    fresh: u32,
    freed: VecDeque<u32>,
    capacity: u32,
}

impl Slots {
    /// All slots but those `in_use`, which must be below `capacity`.
    pub(super) fn new(capacity: u32, in_use: impl Fn(u32) -> bool) -> Self {
        let fresh = (0..capacity)
            .rev()
            .find(|slot| in_use(*slot))
            .map_or(0, |last| last + 1);
        let freed = (0..fresh).filter(|slot| !in_use(*slot)).collect();
        Self {
            fresh,
            freed,
            capacity,
        }
    }

    pub(super) fn take(&mut self) -> Option<u32> {
        if self.fresh < self.capacity {
            self.fresh += 1;
            return Some(self.fresh - 1);
        }
        self.freed.pop_front()
    }

    /// Gives back a slot that [`Self::take`] gave.
    pub(super) fn free(&mut self, slot: u32) {
        self.freed.push_back(slot);
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use proptest::prelude::*;

    use super::Slots;

    #[test]
    fn the_slot_freed_longest_ago_comes_last() {
        let mut slots = Slots::new(3, |_| false);
        assert_eq!([slots.take(), slots.take()], [Some(0), Some(1)]);
        slots.free(1);
        slots.free(0);
        assert_eq!(
            [slots.take(), slots.take(), slots.take()],
            [Some(2), Some(1), Some(0)]
        );
        assert_eq!(slots.take(), None);
    }

    proptest! {
        #[test]
        fn no_slot_is_given_twice(
            adopted in prop::collection::hash_set(0_u32..16, 0..16),
            steps in prop::collection::vec(any::<Option<prop::sample::Index>>(), 0..200),
        ) {
            let mut held: Vec<u32> = adopted.iter().copied().collect();
            let mut slots = Slots::new(16, |slot| adopted.contains(&slot));
            for step in steps {
                match step {
                    Some(which) if !held.is_empty() => {
                        let at = which.index(held.len());
                        slots.free(held.swap_remove(at));
                    }
                    _ => match slots.take() {
                        Some(slot) => held.push(slot),
                        None => prop_assert_eq!(held.len(), 16),
                    },
                }
                prop_assert_eq!(held.iter().collect::<HashSet<_>>().len(), held.len());
                prop_assert!(held.iter().all(|slot| *slot < 16));
            }
        }
    }
}
