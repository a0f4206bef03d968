# Four processes that write to one database at a time, readers beside them; then one large transaction, checked.
sqlite3 load.db 'pragma journal_mode = wal; create table t (id integer primary key, who int, n int, text text); create index by_who on t (who, n);'
for who in 1 2 3 4; do
    (
        n=0
        while [ $n -lt 25 ]; do
            sqlite3 -cmd '.timeout 60000' load.db "begin immediate; insert into t (who, n, text) select $who, $n * 10 + value, hex($n * value) from generate_series(0, 9); commit;" || echo "writer $who failed"
            n=$((n + 1))
        done
    ) &
done
for reader in 1 2; do
    (
        n=0; last=0
        while [ $n -lt 15 ]; do
            count=$(sqlite3 -cmd '.timeout 60000' load.db 'select count(*) from t')
            [ "$count" -ge "$last" ] && [ $((count % 10)) -eq 0 ] || echo "reader saw $count after $last"
            last=$count; n=$((n + 1))
        done
    ) &
done
wait
sqlite3 load.db 'select who, count(*), sum(n), min(text), max(text) from t group by who; pragma integrity_check;'
sqlite3 load.db "begin; with recursive c (n) as (select 1 union all select n + 1 from c where n < 60000) insert into t (who, n, text) select n % 97 + 10, n, printf('%08d', n * 7919 % 60000) from c; update t set text = upper(text) || who where who % 3 = 0; delete from t where n % 11 = 0; commit; pragma wal_checkpoint(truncate); vacuum; analyze; pragma integrity_check; select count(*), sum(n), sum(length(text)) from t; select group_concat(text) from (select text from t where who = 40 order by text limit 5);"
sqlite3 load.db 'select who, n, text from t order by who, n, text' | sha256sum; sqlite3 :memory: ".mode csv" ".import '|seq 1 5000' n" 'select sum("1") from n'
