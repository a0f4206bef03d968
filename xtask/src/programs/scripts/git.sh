# A history with branches, merges and tags; a clone of it; everything checked, packed and looked at.
export GIT_AUTHOR_NAME=A GIT_AUTHOR_EMAIL=a@example.org GIT_COMMITTER_NAME=C GIT_COMMITTER_EMAIL=c@example.org
export GIT_CONFIG_GLOBAL=/dev/null GIT_CONFIG_SYSTEM=/dev/null GIT_PAGER=cat
stamp() { GIT_AUTHOR_DATE="2020-01-01T00:$1:00Z"; GIT_COMMITTER_DATE=$GIT_AUTHOR_DATE; export GIT_AUTHOR_DATE GIT_COMMITTER_DATE; }
git init -q -b main origin; cd origin
for n in 10 11 12 13 14 15 16 17; do
    stamp $n; seq 1 "$n"00 >numbers; mkdir -p "d$n"; echo "file $n" >"d$n/file"; git add .; git commit -q -m "commit $n"
done
git checkout -q -b side HEAD~3; stamp 30; echo side >side; git add side; git commit -q -m side
git checkout -q main; stamp 31; git merge -q --no-edit side; git tag -a -m "a tag" v1
stamp 32; sed -i s/^7$/seven/ numbers; git commit -q -a -m seven
git checkout -q -b clash HEAD~1; stamp 33; sed -i s/^7$/SEVEN/ numbers; git commit -q -a -m clash
git merge main >merge.log 2>&1; echo "clash $?"; grep -c CONFLICT merge.log; git merge --abort; git checkout -q main
cd ..
git clone -q origin clone; git clone -q --bare --no-local origin bare.git 2>&1
cd clone
git log --graph --format='%h %an %ad %s' --date=iso-strict --stat | sed 's/ *$//'
git fsck --full 2>&1; git rev-parse HEAD v1; git ls-tree -r --name-only HEAD | tail -n 3
git blame -s numbers | sed -n '5,8p'; git grep -n 'file 1[34]'; git diff HEAD~2 --shortstat; git describe --long
git repack -q -a -d -f; git gc -q; git count-objects -v | grep -E '^(count|in-pack|packs)'; git verify-pack -v .git/objects/pack/*.idx | grep -c commit
stamp 40; echo more >>numbers; git stash -q; git stash list; git stash pop -q; git commit -q -a -m more; git push -q origin HEAD:refs/heads/pushed 2>&1; git -C ../origin log -1 --format=%s pushed
git rebase -q origin/side 2>&1 | head -n 2; git log --oneline | wc -l; git archive HEAD d10 | sha256sum; git -C ../bare.git rev-list --all --count
