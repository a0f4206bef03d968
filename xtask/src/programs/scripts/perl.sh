# Children, pipes, sockets, signals, sorting and formats in Perl.
perl -e '
use strict; use warnings; use Socket; use IO::Handle; use POSIX ":sys_wait_h";
my %words; $words{$_ % 1009} .= chr(97 + $_ % 26) for 1 .. 60000;
my @longest = sort { length $words{$b} <=> length $words{$a} || $a <=> $b } keys %words;
print "words @longest[0 .. 4] ", length $words{$longest[0]}, "\n";
my $text = join ",", map { sprintf "%05.2f", $_ / 7 } 1 .. 2000;
(my $copy = $text) =~ s/(\d+)\.(\d+)/$2.$1/g;
print "text ", unpack("%32C*", $copy), " ", scalar(() = $copy =~ /99/g), "\n";
my @children;
for my $child (1 .. 5) {
    pipe my $reader, my $writer or die;
    my $pid = fork // die;
    if (!$pid) { close $reader; print $writer $child ** 3; close $writer; exit $child }
    close $writer; push @children, [$pid, $reader];
}
for (@children) { my ($pid, $reader) = @$_; my $said = <$reader>; waitpid $pid, 0; print "child $said ", $? >> 8, "\n" }
socketpair my $ours, my $theirs, AF_UNIX, SOCK_STREAM, PF_UNSPEC or die;
$_->autoflush for $ours, $theirs;
if (!fork) { close $ours; while (<$theirs>) { print $theirs uc } exit 0 }
close $theirs;
for (1 .. 50) { print $ours "line $_\n"; my $back = <$ours>; $back eq "LINE $_\n" or die $back }
close $ours; print "echoed ", waitpid(-1, 0) > 0, "\n";
my $handled = 0; local $SIG{USR1} = sub { $handled++ }; kill USR1 => $$ for 1 .. 100; print "handled $handled\n";
my $late = eval { local $SIG{ALRM} = sub { die "late\n" }; alarm 1; select undef, undef, undef, 10; 0 } // $@; print "alarm $late";
my $piped = `seq 1 1000 | sort -rn | head -n 3`; $piped =~ s/\n/ /g; print "piped $piped ", $?, "\n";
open my $file, "+>", "file" or die; print $file "x" x 100000; seek $file, 50000, 0; print $file "y"; close $file;
print "file ", -s "file", " ", (stat "file")[7], "\n"; opendir my $here, "."; print "here @{[sort grep !/^\./, readdir $here]}\n";
my $pid = open my $output, "-|", "sh", "-c", "kill -TERM \$\$"; waitpid $pid, 0; print "signal ", $? & 127, "\n";
'
