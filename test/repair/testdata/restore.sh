# Makes it the rig's node again, whatever the test came to.
export DEBIAN_FRONTEND=noninteractive
test -d /run/repair/kept || exit 0
touch /run/repair/go-on
while systemctl is-active -q 'host-hygiene-*'; do sleep 0.5; done
/opt/repair/agent rollback --all || true
apt-get -qq install -y multipath-tools open-iscsi >/dev/null
dpkg --purge hygiene-slow
cp -a /run/repair/kept/sources.list /etc/apt/
test ! -d /opt/repair/lists || rm -rf /var/lib/apt/lists
test ! -d /opt/repair/lists || mv /opt/repair/lists /var/lib/apt/lists
cp -a /run/repair/kept/multipath.conf /etc/
cp -a /run/repair/kept/rig.conf /etc/modules-load.d/
modprobe -a iscsi_tcp dm_multipath
systemctl restart multipathd
systemctl start iscsid rig-iscsi
rm -rf /run/repair /opt/repair /var/lib/host-hygiene/plans
