# Pipes, substitutions, traps, coprocesses and job control of a script, then of a shell at a terminal.
bash <<'BASH'
set -o pipefail
seq 1 20000 | awk '{ s += $1 } END { print s }' | tr 0 o | rev
false | true; echo "pipe $? ${PIPESTATUS[*]}"
diff <(seq 1 5) <(seq 2 6); echo "diff $?"
cat <<< "here $(echo inner "$(echo innermost)")" | tee >(wc -c >count) | rev; sleep 0.3; cat count
coproc UP { while read -r line; do echo "${line^^}"; done; }
for word in one two three; do echo $word >&"${UP[1]}"; read -r back <&"${UP[0]}"; echo "coproc $back"; done
eval "exec ${UP[1]}>&-"; wait "$UP_PID"; echo "coproc ended $?"
trap 'echo got usr1' USR1; kill -USR1 $$; trap - USR1
(trap 'echo leaving' EXIT; exit 5); echo "subshell $?"
(trap 'echo term; exit 9' TERM; touch ready; while :; do sleep 0.02; done) & job=$!
until [ -e ready ]; do sleep 0.02; done; kill $job; wait $job; echo "trapped $?"
sleep 100 & job=$!; kill $job; wait $job 2>/dev/null; echo "killed $?"
set -m
sleep 0.2 & wait %1; echo "job $?"
(exit 3) & wait -n; echo "any $?"; wait
sleep 100 & kill -STOP %%; until jobs | grep -q Stopped; do sleep 0.05; done; jobs | sed 's/ *$//'; kill -CONT %%; until jobs | grep -q Running; do sleep 0.05; done; jobs -r | sed 's/ *$//'; kill %%; wait %% 2>/dev/null; echo "stopped, continued, killed $?"
ulimit -n 64; exec 9<&0; declare -A map; for i in {1..500}; do map[k$((i % 37))]=$i; done; echo "${#map[@]} ${map[k5]}"
time_it() { local TIMEFORMAT=%R; { time sleep 0.1; } 2>&1 | grep -c '^[0-9]*[.][0-9]'; }; time_it
timeout 0.2 sleep 5; echo "timeout $?"
for i in 1 2 3 4; do (sleep 0.$((5 - i)); echo "item $i") & done | sort
wait; printf '%s\n' b c a | sort | xargs -n 1 -P 2 echo | sort | paste -sd,
BASH
python3 - <<'PYTHON'
# A person at a terminal: a job is stopped by ^Z, goes on in the background, comes back, ends by ^C.
import os, pty, re, select, sys, time
pid, terminal = pty.fork()
if pid == 0:
    os.environ.update(PS1='$ ', TERM='dumb')
    os.execvp('bash', ['bash', '--norc', '--noprofile', '--noediting', '-i'])
seen = ''
def until(end):
    global seen
    limit = time.monotonic() + 60
    start = len(seen)
    while not re.search(end, seen[start:]):
        if not select.select([terminal], [], [], max(0, limit - time.monotonic()))[0]:
            sys.exit('no %r in %r' % (end, seen))
        try: data = os.read(terminal, 1000)
        except OSError: break
        if not data: break
        seen += data.decode()
def say(text, end=r'\$ $'):
    os.write(terminal, text.encode())
    until(end)
until(r'\$ $')
say('sleep 300\n', r'sleep 300\r\n')
time.sleep(0.5)
say('\x1a')
say('jobs\n')
say('bg\n')
say('jobs -r\n')
say('fg\n', 'sleep 300\r\n')
time.sleep(0.5)
say('\x03')
say('echo status $?\n')
say('tty | cut -c1-9; stty size\n')
say('cat | tr a-z A-Z\n', r'\n')
say('words\n', 'words')
say('\x04')
os.write(terminal, b'exit 7\n')
until('never')
print(re.sub(r'\d{3,}', 'N', seen).replace('\r', ''), os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
PYTHON
