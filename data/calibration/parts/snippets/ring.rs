//! A fixed-capacity ring buffer that overwrites its oldest element.

#[derive(Debug, Clone)]
pub struct Ring<T> {
    items: Vec<T>,
    capacity: usize,
    start: usize,
}

impl<T> Ring<T> {
    /// # Panics
    /// If `capacity` is zero.
    pub fn new(capacity: usize) -> Self {
        assert!(capacity > 0, "a ring needs room for one element");
        Self { items: Vec::with_capacity(capacity), capacity, start: 0 }
    }

    /// Appends `item` and returns the one that had to make room for it.
    pub fn push(&mut self, item: T) -> Option<T> {
        if self.items.len() < self.capacity {
            self.items.push(item);
            return None;
        }
        let old = std::mem::replace(&mut self.items[self.start], item);
        self.start = (self.start + 1) % self.capacity;
        Some(old)
    }

    pub fn iter(&self) -> impl Iterator<Item = &T> {
        let (newer, older) = self.items.split_at(self.start);
        older.iter().chain(newer)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn overwrites_the_oldest() {
        let mut ring = Ring::new(3);
        let dropped: Vec<_> = (1..=5).filter_map(|n| ring.push(n)).collect();
        assert_eq!(dropped, [1, 2]);
        assert_eq!(ring.iter().copied().collect::<Vec<_>>(), [3, 4, 5]);
    }
}
