//! Circles in a directed graph: its strongly connected parts of more than one node (Tarjan's algorithm).

use std::collections::{BTreeMap, BTreeSet};

/// The circles, each sorted.
pub(crate) fn of<Node: Ord + Clone>(arrows: &BTreeMap<Node, BTreeSet<Node>>) -> Vec<Vec<Node>> {
    let mut search = Search {
        arrows,
        numbers: BTreeMap::new(),
        stack: Vec::new(),
        found: Vec::new(),
    };
    for node in arrows.keys() {
        if !search.numbers.contains_key(node) {
            search.visit(node);
        }
    }
    search.found
}

struct Search<'a, Node> {
    arrows: &'a BTreeMap<Node, BTreeSet<Node>>,
    /// The order in which nodes were met.
    numbers: BTreeMap<&'a Node, usize>,
    /// Nodes whose part is not complete yet.
    stack: Vec<&'a Node>,
    found: Vec<Vec<Node>>,
}

impl<'a, Node: Ord + Clone> Search<'a, Node> {
    /// Returns the least number that can be reached from the node within its part.
    fn visit(&mut self, node: &'a Node) -> usize {
        let number = self.numbers.len();
        self.numbers.insert(node, number);
        self.stack.push(node);
        let mut least = number;
        for to in self.arrows.get(node).into_iter().flatten() {
            match self.numbers.get(to).copied() {
                None => least = least.min(self.visit(to)),
                Some(met) if self.stack.contains(&to) => least = least.min(met),
                Some(_) => {}
            }
        }
        if least == number {
            let start = self.stack.iter().position(|other| *other == node);
            let mut part: Vec<Node> = self
                .stack
                .drain(start.expect("pushed above")..)
                .cloned()
                .collect();
            if part.len() > 1 {
                part.sort();
                self.found.push(part);
            }
        }
        least
    }
}

#[test]
fn circles_are_found_and_lines_are_not() {
    let graph = |arrows: &[(char, char)]| {
        let mut graph: BTreeMap<char, BTreeSet<char>> = BTreeMap::new();
        for (from, to) in arrows {
            graph.entry(*from).or_default().insert(*to);
        }
        graph
    };
    assert!(of(&graph(&[('a', 'b'), ('b', 'c'), ('a', 'c')])).is_empty());
    assert_eq!(
        of(&graph(&[('a', 'b'), ('b', 'a'), ('b', 'c')])),
        [['a', 'b']]
    );
    let two = graph(&[
        ('a', 'b'),
        ('b', 'c'),
        ('c', 'a'),
        ('c', 'd'),
        ('d', 'e'),
        ('e', 'd'),
    ]);
    assert_eq!(of(&two), [vec!['d', 'e'], vec!['a', 'b', 'c']]);
}
