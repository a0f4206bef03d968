//! Which files the program may have.

use super::path::NormalPath;
use super::refusal::Remedy;

/// What a rule gives of a path and everything below it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum FileAccess {
    /// Reading, listing, executing.
    ReadOnly,
    /// That, and writing its contents. Of devices that others use too, owner and mode are
    /// nobody's to change.
    Contents,
    /// That, and changing attributes, making, removing and renaming.
    ReadWrite,
}

/// What a call needs of a path.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Need {
    /// To know of it: `stat`, `readlink`, `chdir`. The folders above a rule's
    /// path may be looked at too, or no program could find its way down.
    Look,
    /// To read or list it, or to execute it.
    Read,
    /// To change its contents.
    Write,
    /// To change its mode, owner, times or extended attributes, or to give it another name.
    Attributes,
    /// To make, remove or rename something directly in this folder.
    Entries,
}

/// One rule: this path, and all below it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FileRule {
    /// The path, resolved: no name in it is a symbolic link, except below
    /// `/proc/self`.
    pub path: NormalPath,
    /// What it gives.
    pub access: FileAccess,
}

/// Rules over paths; what no rule gives is refused.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct FileRules(Vec<FileRule>);

impl FileRules {
    /// No rule: nothing is allowed.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a rule; the same path twice has the larger access.
    pub fn allow(&mut self, path: NormalPath, access: FileAccess) {
        match self.0.iter_mut().find(|rule| rule.path == path) {
            Some(rule) => rule.access = rule.access.max(access),
            None => self.0.push(FileRule { path, access }),
        }
    }

    /// The rules in the order they were made.
    pub fn iter(&self) -> impl Iterator<Item = &FileRule> {
        self.0.iter()
    }

    /// The largest access that any rule gives to `path`.
    #[must_use]
    pub fn access(&self, path: &NormalPath) -> Option<FileAccess> {
        self.0
            .iter()
            .filter(|rule| path.is_within(&rule.path))
            .map(|rule| rule.access)
            .max()
    }

    /// Whether `path`, which must be resolved, may be used so.
    ///
    /// # Errors
    ///
    /// With the rule that would allow it.
    pub fn decide(&self, path: &NormalPath, need: Need) -> Result<(), Remedy> {
        let given = self.access(path);
        let enough = match need {
            Need::Look => given.is_some() || self.0.iter().any(|rule| rule.path.is_within(path)),
            Need::Read => given.is_some(),
            Need::Write => given >= Some(FileAccess::Contents),
            Need::Attributes | Need::Entries => given == Some(FileAccess::ReadWrite),
        };
        if enough {
            return Ok(());
        }
        Err(match need {
            Need::Look | Need::Read => Remedy::ReadOnly(path.clone()),
            Need::Write | Need::Attributes | Need::Entries => Remedy::ReadWrite(path.clone()),
        })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn path(text: &str) -> NormalPath {
        NormalPath::new(text.as_bytes()).unwrap()
    }

    fn rules() -> FileRules {
        let mut rules = FileRules::new();
        rules.allow(path("/usr/lib"), FileAccess::ReadOnly);
        rules.allow(path("/work"), FileAccess::ReadWrite);
        rules.allow(path("/work/keep"), FileAccess::ReadOnly);
        rules
    }

    #[test]
    fn nothing_is_allowed_without_a_rule() {
        let none = FileRules::new();
        for need in [
            Need::Look,
            Need::Read,
            Need::Write,
            Need::Attributes,
            Need::Entries,
        ] {
            assert!(none.decide(&path("/"), need).is_err());
            assert!(none.decide(&path("/etc/passwd"), need).is_err());
        }
    }

    #[test]
    fn rules_give_what_is_below_them() {
        let rules = rules();
        assert_eq!(rules.decide(&path("/usr/lib/x.so"), Need::Read), Ok(()));
        assert_eq!(rules.decide(&path("/work/a/b"), Need::Write), Ok(()));
        assert_eq!(rules.decide(&path("/work"), Need::Entries), Ok(()));
        assert_eq!(
            rules.decide(&path("/usr/lib/x.so"), Need::Write),
            Err(Remedy::ReadWrite(path("/usr/lib/x.so")))
        );
        assert_eq!(
            rules.decide(&path("/usr/libexec"), Need::Read),
            Err(Remedy::ReadOnly(path("/usr/libexec")))
        );
        // As Landlock does it, rules add up: a narrower one takes nothing away.
        assert_eq!(rules.decide(&path("/work/keep/x"), Need::Write), Ok(()));
    }

    #[test]
    fn the_way_down_to_a_rule_may_be_looked_at_and_no_more() {
        let rules = rules();
        assert_eq!(rules.decide(&path("/usr"), Need::Look), Ok(()));
        assert_eq!(rules.decide(&path("/"), Need::Look), Ok(()));
        assert!(rules.decide(&path("/usr"), Need::Read).is_err());
        assert!(rules.decide(&path("/usr/bin"), Need::Look).is_err());
    }

    fn any_path() -> impl Strategy<Value = NormalPath> {
        "(/[ab]){0,4}".prop_map(|text| path(&format!("/{text}")))
    }

    fn any_need() -> impl Strategy<Value = Need> {
        prop_oneof![
            Just(Need::Look),
            Just(Need::Read),
            Just(Need::Write),
            Just(Need::Entries)
        ]
    }

    fn any_rules() -> impl Strategy<Value = FileRules> {
        proptest::collection::vec((any_path(), any::<bool>()), 0..4).prop_map(|list| {
            let mut rules = FileRules::new();
            for (path, write) in list {
                let access = if write {
                    FileAccess::ReadWrite
                } else {
                    FileAccess::ReadOnly
                };
                rules.allow(path, access);
            }
            rules
        })
    }

    proptest! {
        #[test]
        fn the_remedy_is_one(rules in any_rules(), path in any_path(), need in any_need()) {
            if let Err(remedy) = rules.decide(&path, need) {
                let mut rules = rules;
                match remedy {
                    Remedy::ReadOnly(path) => rules.allow(path, FileAccess::ReadOnly),
                    Remedy::ReadWrite(path) => rules.allow(path, FileAccess::ReadWrite),
                    other => prop_assert!(false, "{other:?}"),
                }
                prop_assert_eq!(rules.decide(&path, need), Ok(()));
            }
        }

        #[test]
        fn another_rule_never_takes_away(
            rules in any_rules(), more in any_path(), path in any_path(), need in any_need()
        ) {
            if rules.decide(&path, need).is_ok() {
                let mut rules = rules;
                rules.allow(more, FileAccess::ReadOnly);
                prop_assert_eq!(rules.decide(&path, need), Ok(()));
            }
        }

        #[test]
        fn reading_or_writing_needs_a_rule_above(
            rules in any_rules(), path in any_path(), need in any_need()
        ) {
            if need != Need::Look && rules.decide(&path, need).is_ok() {
                prop_assert!(rules.iter().any(|rule| path.is_within(&rule.path)));
            }
        }
    }
}
