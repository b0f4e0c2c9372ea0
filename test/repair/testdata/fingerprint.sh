# Every file a repair could touch, by all that can be seen of it. Not all of the
# folders are there. The running agent's socket is no change to the host.
where="/etc /boot /usr/lib/systemd /usr/lib/modules-load.d /usr/lib/sysctl.d /usr/local /usr/sbin /var/lib/dpkg /var/lib/apt /var/lib/iscsi /var/lib/systemd/deb-systemd-helper-enabled /var/lib/host-hygiene/plans /var/cache/apt /var/log/apt /root"
ls -A /var/lib/host-hygiene 2>/dev/null | grep -vx agent.sock || true
find $where -printf '%p\t%y %m %U:%G %s modified %T@ changed %C@ %l\n' 2>/dev/null || true
find /etc /var/lib/dpkg /var/lib/apt /var/lib/host-hygiene /var/log/apt -type f -exec sha256sum {} + | sed -E 's/^(\S+)\s+(.*)/\2 content\t\1/'
grep -oE '^(iscsi_tcp|dm_multipath) ' /proc/modules || true
