# Makes a node of the rig one that has never had storage packages, and whose
# only repository is a folder: with the packages it lost, and hygiene-slow, whose
# installation waits for the test.
export DEBIAN_FRONTEND=noninteractive
mkdir -p /run/repair/repo
cd /run/repair/repo
test -e multipath-tools_*.deb || apt-get -qq download multipath-tools open-iscsi
mkdir -p slow/DEBIAN
printf 'Package: hygiene-slow\nVersion: 1\nArchitecture: all\nMaintainer: nobody <nobody@example.org>\nDescription: for a test\n' >slow/DEBIAN/control
printf '#!/bin/sh\ntouch /run/repair/waiting\nfor i in $(seq 1200); do test -e /run/repair/go-on && exit 0; sleep 0.2; done\nexit 1\n' >slow/DEBIAN/postinst
chmod 755 slow/DEBIAN/postinst
dpkg-deb -Znone --build slow hygiene-slow_1_all.deb >/dev/null
rm -rf slow
for f in *.deb; do
  dpkg-deb -f $f
  printf 'Filename: ./%s\nSize: %s\nSHA256: %s\n\n' $f $(stat -c %s $f) $(sha256sum $f | cut -d' ' -f1)
done >Packages

mkdir -p /run/repair/kept
for f in /etc/apt/sources.list /etc/multipath.conf /etc/modules-load.d/rig.conf; do cp -a $f /run/repair/kept/; done
mv /var/lib/apt/lists /opt/repair/lists
mkdir -p /var/lib/apt/lists/partial
echo 'deb [trusted=yes] file:/run/repair/repo ./' >/etc/apt/sources.list
printf 'overlay\nbr_netfilter\n' >/etc/modules-load.d/rig.conf

systemctl stop rig-iscsi
iscsiadm -m node --logoutall=all
systemctl stop multipathd.socket multipathd.service
multipath -F
apt-get -qq purge -y multipath-tools open-iscsi >/dev/null
rm -rf /etc/multipath /etc/multipath.conf /etc/iscsi /var/lib/iscsi
modprobe -r iscsi_tcp
# Its path selectors hold it.
modprobe -r dm_service_time
modprobe -r dm_multipath
if grep -E '^(iscsi_tcp|dm_multipath) ' /proc/modules; then exit 1; fi
systemctl daemon-reload
systemctl reset-failed

apt-get -qq update
# Lists of the day before yesterday are read anew first.
touch -d '2 days ago' /var/lib/apt/lists /var/lib/apt/lists/partial
rm -f /var/lib/apt/periodic/update-success-stamp
: >/var/log/apt/history.log
