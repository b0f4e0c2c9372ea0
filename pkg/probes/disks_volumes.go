package probes

import (
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"path"
	"slices"
	"strings"
	"time"
	"unicode"

	"github.com/hosthygiene/agent/pkg/finding"
	"github.com/hosthygiene/agent/pkg/host"
)

// csiVolume is a volume as its driver knows it.
type csiVolume struct{ Driver, Handle string }

// csiVolumeName begins the unique names of CSI volumes.
const csiVolumeName = "kubernetes.io/csi/"

// parseVolumeName takes the unique name of a volume apart,
// "kubernetes.io/csi/DRIVER^HANDLE" (GetVolumeName of kubernetes
// pkg/volume/csi/csi_plugin.go); ok is false for those of other plugins.
func parseVolumeName(name string) (v csiVolume, ok bool) {
	rest, ok := strings.CutPrefix(name, csiVolumeName)
	if !ok {
		return csiVolume{}, false
	}
	driver, handle, ok := strings.Cut(rest, "^")
	if !ok || driver == "" || handle == "" {
		return csiVolume{}, false
	}
	return csiVolume{driver, handle}, true
}

func (v csiVolume) String() string { return csiVolumeName + v.Driver + "^" + v.Handle }

// attachment is the name of the volume's VolumeAttachment to a node
// (getAttachmentName of kubernetes pkg/volume/csi/csi_attacher.go).
func (v csiVolume) attachment(node string) string {
	sum := sha256.Sum256([]byte(v.Handle + v.Driver + node))
	return "csi-" + hex.EncodeToString(sum[:])
}

// stagedIn is where below plugins/kubernetes.io/csi the kubelet has the volume
// staged (makeDeviceMountPath, since Kubernetes 1.24).
func (v csiVolume) stagedIn() string {
	sum := sha256.Sum256([]byte(v.Handle))
	return v.Driver + "/" + hex.EncodeToString(sum[:])
}

// csiMounts is what the mount tables have of CSI volumes.
type csiMounts struct {
	// staged are the folders of global mounts below plugins/kubernetes.io/csi, and
	// "volumeDevices/NAME" of raw block volumes.
	staged map[string]bool
	// volumes are those of which a mount's vol_data.json was read: those that pods
	// have, with one of the pods' mounts, and those with global mounts of the old
	// layout.
	volumes map[csiVolume]csiMount
	// unread: some could not be read, so what is not in volumes may be mounted.
	unread bool
}

type csiMount struct {
	mount
	data volumeData
	// pod: the mount is for a pod.
	pod bool
}

// has reports whether anything of a volume is mounted.
func (c csiMounts) has(v csiVolume) bool {
	_, ok := c.volumes[v]
	return ok || c.staged[v.stagedIn()]
}

// rememberedData is vol_data.json by the directory it lies in. The directory's
// name has the pod's UID and the volume's name in it, or stands for the handle
// alone, so that another volume's file never has the same.
type rememberedData map[string]volumeData

// csi looks through the mount tables, once in a pass.
func (p *diskPass) csi(ctx context.Context) csiMounts {
	if p.csiMounts != nil {
		return *p.csiMounts
	}
	const key = "volume data"
	kept, _ := Kept[rememberedData](p.Memory, key)
	next := make(rememberedData, len(kept))
	c := csiMounts{staged: map[string]bool{}, volumes: map[csiVolume]csiMount{}}
	for _, m := range p.mounts.Mounts {
		if !p.isKubelets(ctx, m) {
			continue
		}
		staged, dir, pod := csiMountAt(m.Mountpoint)
		if staged != "" {
			c.staged[staged] = true
		}
		if dir == "" {
			continue
		}
		data, ok := next[dir]
		if !ok {
			if data, ok = kept[dir]; !ok {
				var err error
				if data, err = readVolumeData(ctx, p.Host, volume{Dir: dir, Plugin: "csi"}); err != nil {
					c.unread = true
					p.fail(unlessGone(err))
					continue
				}
			}
			next[dir] = data
		}
		v := csiVolume{data.Driver, data.Handle}
		if old, ok := c.volumes[v]; !ok || pod && !old.pod {
			c.volumes[v] = csiMount{m, data, pod}
		}
	}
	p.Memory.Keep(key, next)
	p.csiMounts = &c
	return c
}

// isKubelets reports whether a mount lies where the kubelet keeps its own. A path
// that merely looks like one of its is not enough: with FUSE every user mounts, and
// lays a vol_data.json beside it.
func (p *diskPass) isKubelets(ctx context.Context, m mount) bool {
	if p.kubeletRoots == nil {
		root := "/var/lib/kubelet"
		if k := p.mounts.Kubelet; k != nil {
			root = k.RootDir
		}
		p.kubeletRoots = []string{root}
		// The mount table has the way to it without symlinks.
		if real, err := p.Host.RealPath(ctx, root); err == nil && real != root {
			p.kubeletRoots = append(p.kubeletRoots, real)
		}
	}
	return slices.ContainsFunc(p.kubeletRoots, func(root string) bool {
		rest, ok := strings.CutPrefix(m.Mountpoint, root)
		return ok && (strings.HasPrefix(rest, "/plugins/") || strings.HasPrefix(rest, "/pods/"))
	})
}

// csiMountAt tells what a mount point of the kubelet's is: the folder a volume is
// staged in, and the directory of the vol_data.json that says which volume it is,
// where the path alone does not; pod is set where the mount is for one.
func csiMountAt(point string) (staged, dir string, pod bool) {
	const devices = "/kubernetes.io/csi/volumeDevices/"
	if i := strings.Index(point, devices); i >= 0 {
		name := rawVolume(point)
		if name == "" {
			return "", "", false
		}
		rest := point[i+len(devices):]
		return "volumeDevices/" + name, point[:i+len(devices)] + name + "/data", !strings.HasPrefix(rest, "staging/")
	}
	v, ok := volumeAt(point)
	switch {
	case !ok || v.Plugin != "csi":
		return "", "", false
	case !v.Global:
		return "", v.Dir, true
	case v.Name != "": // .../csi/pv/NAME/globalmount
		return "pv/" + v.Name, v.Dir, false
	}
	_, staged, _ = strings.Cut(v.Dir, "/plugins/kubernetes.io/csi/")
	return staged, "", false
}

// checkStaged looks for volumes that are staged on this node and used by no pod:
// normally the kubelet unstages a volume within seconds of its last pod.
func (p *diskPass) checkStaged(ctx context.Context) {
	for _, d := range p.stagedDevices(ctx) {
		global := slices.IndexFunc(d.Mounts, func(m mount) bool { v, ok := volumeAt(m.Mountpoint); return ok && v.Global })
		if global < 0 {
			continue
		}
		m := d.Mounts[global]
		if slices.ContainsFunc(d.Mounts, func(other mount) bool {
			v, ok := volumeAt(other.Mountpoint)
			// Network mounts of one server can share a device number: then it is
			// what lies below the staged directory that is the volume.
			return (!ok || !v.Global) && (d.Dev.Major != 0 || d.fsType() == "btrfs" || isBelow(other.Root, m.Root))
		}) {
			continue
		}
		if p.Now.Sub(p.Memory.Since("staged "+m.Mountpoint, p.Now)) < p.LeftoverAfter.D() {
			continue
		}
		// A driver may mount anew for each pod what it has staged.
		v, _ := volumeAt(m.Mountpoint)
		data, err := readVolumeData(ctx, p.Host, v)
		p.fail(unlessGone(err))
		volume := csiVolume{data.Driver, data.Handle}
		if used, ok := p.csi(ctx).volumes[volume]; err == nil && ok && used.pod {
			continue
		}
		subject, label, evidence := p.describe(ctx, &mountedDevice{Dev: d.Dev, Name: d.Name, Mounts: []mount{m}})
		f := finding.Finding{
			Reason: "LeftoverDevice", Severity: finding.Warning, Subject: subject,
			Message:  fmt.Sprintf("%s is mounted on this node, but no pod here uses it: the volume may be kept from moving to another node", label),
			Evidence: append([]finding.Evidence{{Source: m.Table, Observed: mountLine(m), Expected: "also a mount for a pod, or none"}}, evidence...),
		}
		if err == nil {
			says, more := p.clusterSays(ctx, volume, "")
			f.Message += says
			f.Evidence = append(f.Evidence, more...)
		}
		p.tell(f)
	}
}

// stagedDevices are the mounted block devices that are there, and what else is
// mounted where CSI drivers stage volumes, each such mount with the others of its
// device number, which may be that of several volumes.
func (p *diskPass) stagedDevices(ctx context.Context) []*mountedDevice {
	all := slices.DeleteFunc(slices.Clone(p.mounted), func(d *mountedDevice) bool { return d.Gone })
	staged := func(m mount) bool {
		if m.Dev.Major != 0 || m.FSType == "btrfs" || !strings.HasSuffix(m.Mountpoint, "/globalmount") {
			return false
		}
		v, ok := volumeAt(m.Mountpoint)
		return ok && v.Global && p.isKubelets(ctx, m)
	}
	byDev := map[host.DevNum][]mount{}
	for _, m := range p.mounts.Mounts {
		if staged(m) {
			byDev[m.Dev] = nil
		}
	}
	if len(byDev) == 0 {
		return all
	}
	for _, m := range p.mounts.Mounts {
		if others, ok := byDev[m.Dev]; ok && !staged(m) {
			byDev[m.Dev] = append(others, m)
		}
	}
	for _, m := range p.mounts.Mounts {
		if staged(m) {
			all = append(all, &mountedDevice{Dev: m.Dev, Mounts: append([]mount{m}, byDev[m.Dev]...)})
		}
	}
	return all
}

func isBelow(name, dir string) bool {
	return name == dir || dir == "/" || strings.HasPrefix(name, dir+"/")
}

// deletedRoot ends the root of a mount of something that was unlinked since
// (dentry_path in fs/d_path.c).
const deletedRoot = "//deleted"

// checkRawGone tells raw block volumes whose device the kernel no longer has: its
// node, mounted on a file for the pod, is then one that was unlinked.
func (p *diskPass) checkRawGone(ctx context.Context) {
	gone := func(m mount) bool {
		return m.FSType == "devtmpfs" && strings.HasSuffix(m.Root, deletedRoot) && rawVolume(m.Mountpoint) != "" && p.isKubelets(ctx, m)
	}
	if !slices.ContainsFunc(p.mounts.Mounts, gone) {
		return
	}
	told := map[string]bool{}
	for _, m := range p.mounts.Mounts {
		name := rawVolume(m.Mountpoint)
		if !gone(m) || told[name] {
			continue
		}
		told[name] = true
		disk := path.Base(strings.TrimSuffix(m.Root, deletedRoot))
		f := finding.Finding{
			Reason: "MountedDeviceGone", Severity: finding.Critical, Subject: shown(name),
			Evidence: []finding.Evidence{{Source: m.Table, Observed: shown(m.Mountpoint + " is the node " + m.Root), Expected: "the node of a device that is there"}},
		}
		what, says := "CSI", ""
		_, dir, _ := csiMountAt(m.Mountpoint)
		if data, err := readVolumeData(ctx, p.Host, volume{Dir: dir, Plugin: "csi"}); err == nil {
			what = shown(data.Driver)
			f.Evidence = append(f.Evidence, finding.Evidence{Source: shown(dir + "/vol_data.json"), Observed: "volumeHandle " + shown(data.Handle)})
			var more []finding.Evidence
			says, more = p.clusterSays(ctx, csiVolume{data.Driver, data.Handle}, name)
			f.Evidence = append(f.Evidence, more...)
		}
		f.Message = fmt.Sprintf("PersistentVolume %s (%s, raw block) is still given to a pod, but its device, %s, is gone from this host: what is written there is lost%s", shown(name), what, shown(disk), says)
		p.tell(f)
	}
}

// ofNode is the Node as it was last seen; ok is false without a cluster, and where
// it has not been seen.
func (p *diskPass) ofNode() (n Node, ok bool) {
	if p.node == nil {
		p.node = &Node{}
		if p.Cluster != nil {
			if n, ok := p.Cluster.Node(); ok {
				p.node = &n
			}
		}
	}
	return *p.node, p.node.Name != ""
}

// lists are the CSI volumes of the Node's status.
func (p *diskPass) lists() (attached, inUse map[csiVolume]bool) {
	if p.attached == nil {
		n, _ := p.ofNode()
		p.attached, p.inUse = csiVolumes(n.VolumesAttached), csiVolumes(n.VolumesInUse)
	}
	return p.attached, p.inUse
}

func csiVolumes(names []string) map[csiVolume]bool {
	set := make(map[csiVolume]bool, len(names))
	for _, name := range names {
		if v, ok := parseVolumeName(name); ok {
			set[v] = true
		}
	}
	return set
}

// comparedVolumes is what was held against each other and found well: while
// neither has changed it is so again, and on a node with hundreds of volumes that
// is much to save.
type comparedVolumes struct {
	mounts          [2]int
	kubelet         bool
	attached, inUse []string
	count           int
}

// checkVolumes holds what the cluster says is attached to this node against what
// the host has. The two lists of the Node's status come with the one watch on it;
// the API server is asked for the VolumeAttachment of a volume only where they do
// not go together with the mounts.
func (p *diskPass) checkVolumes(ctx context.Context) {
	p.checkStagingFolders(ctx)
	const key = "volumes compared"
	n, ok := p.ofNode()
	if !ok {
		return
	}
	now := comparedVolumes{mounts: p.mounts.Version, kubelet: p.mounts.Kubelet != nil, attached: n.VolumesAttached, inUse: n.VolumesInUse}
	if old, ok := Kept[comparedVolumes](p.Memory, key); ok && !p.mounts.Partial && old.mounts == now.mounts && old.kubelet == now.kubelet &&
		slices.Equal(old.attached, now.attached) && slices.Equal(old.inUse, now.inUse) {
		p.counted = old.count
		return
	}
	well := p.compareVolumes(ctx)
	now.count = p.counted
	p.Memory.Keep(answersKey, p.answers) // those that this pass needed
	if well {
		p.Memory.Keep(key, now)
	} else {
		p.Memory.Keep(key, nil)
	}
}

// compareVolumes reports whether all goes together.
func (p *diskPass) compareVolumes(ctx context.Context) (well bool) {
	attached, inUse := p.lists()
	if len(attached)+len(inUse) == 0 {
		return true
	}
	all := slices.SortedFunc(maps.Keys(attached), byName)
	for _, v := range slices.SortedFunc(maps.Keys(inUse), byName) {
		if !attached[v] {
			all = append(all, v)
		}
	}
	here := p.csi(ctx)
	absent := !p.mounts.Partial && !here.unread && p.mounts.Kubelet != nil
	if absent {
		p.counted = len(all)
	}
	well = !p.mounts.Partial && !here.unread
	for _, v := range all {
		mounted, ok := here.volumes[v]
		switch {
		case inUse[v] && !attached[v] && ok && mounted.pod:
			p.checkDetached(ctx, v, mounted)
		case inUse[v] && attached[v] && absent && !here.has(v):
			p.checkMissing(ctx, v)
		case attached[v] && !inUse[v] && absent && !here.has(v):
			p.checkLeftAttached(ctx, v)
		default:
			continue
		}
		well = false
	}
	return well && len(p.answers) == 0
}

func byName(a, b csiVolume) int { return strings.Compare(a.String(), b.String()) }

// attachmentAnswer is what the API server said of a volume's attachment. It is not
// asked again while the Node's lists say of the volume what they said then: a
// controller that changes the one changes the others.
type attachmentAnswer struct {
	// attached and inUse are what the lists said.
	attached, inUse bool
	name            string
	is              Attachment
	ok              bool
	// volume is the PersistentVolume, "" where it is not known.
	volume, claim string
	at            time.Time
}

// unfinished: the lists and the attachment say different things, or it is on its
// way out, so that the answer may be another one later.
func (a attachmentAnswer) unfinished() bool {
	return a.attached != (a.ok && a.is.Attached) || a.is.Deleting
}

// attachmentAnswers are remembered as long as each pass needs them.
type attachmentAnswers map[csiVolume]attachmentAnswer

// attachmentFailure is why the API server last could not be asked.
type attachmentFailure struct {
	err error
	at  time.Time
}

const (
	// askTime is how long an answer is waited for. The API server may be away, and
	// the host has to be judged all the same.
	askTime = 5 * time.Second
	// mostAsked is how many volumes are asked for in a pass: a node that loses its
	// storage must not be a burden to the API server besides.
	mostAsked = 16
	// askUnfinished is after how long an unfinished answer is asked for again.
	askUnfinished = 15 * time.Minute

	answersKey = "attachments"
	failureKey = "attachments failed"
)

// ask asks for the attachment of a volume to this node and the claim it is for.
// named is the PersistentVolume as the host knows it, for where there is no
// attachment to say so. ok is false where there is no answer, which is an error
// once that has lasted.
func (p *diskPass) ask(ctx context.Context, v csiVolume, named string) (a attachmentAnswer, ok bool) {
	n, ok := p.ofNode()
	if !ok {
		return a, false
	}
	if p.answers == nil {
		p.answers = attachmentAnswers{}
	}
	kept, _ := Kept[attachmentAnswers](p.Memory, answersKey)
	a, ok = p.answers[v]
	if !ok {
		a, ok = kept[v]
	}
	attached, inUse := p.lists()
	ok = ok && a.attached == attached[v] && a.inUse == inUse[v]
	if ok && !(a.unfinished() && elapsed(p.Now, a.at, askUnfinished)) {
		p.answers[v] = a
		return a, true
	}
	since := p.Memory.Since("attachment not known "+v.String(), p.Now)
	failure, failed := Kept[attachmentFailure](p.Memory, failureKey)
	if !failed || elapsed(p.Now, failure.at, askAgain) {
		if p.asked == mostAsked {
			return a, false
		}
		p.asked++
		a = attachmentAnswer{attached: attached[v], inUse: inUse[v], name: v.attachment(n.Name), at: p.Now}
		err := p.askNow(ctx, &a, named)
		if err == nil {
			p.answers[v] = a
			return a, true
		}
		failure = attachmentFailure{err, p.Now}
		p.Memory.Keep(failureKey, failure)
	}
	// What is being attached is asked for as well, so an API server that is away for
	// a moment is no news about the disks.
	if p.Now.Sub(since) >= askAgain && !p.failed {
		p.failed = true
		p.fail(fmt.Errorf("VolumeAttachment of volume %s: %w", hideInitiatorNames(shown(v.Handle)), failure.err))
	}
	return a, false
}

func (p *diskPass) askNow(ctx context.Context, a *attachmentAnswer, named string) (err error) {
	ctx, cancel := context.WithTimeout(ctx, askTime)
	defer cancel()
	a.is, a.ok, err = p.Cluster.Attachment(ctx, a.name)
	a.volume = cmp.Or(a.is.Volume, named)
	if err == nil && a.volume != "" {
		a.claim, err = p.Cluster.Claim(ctx, a.volume)
	}
	if errors.Is(err, context.DeadlineExceeded) { // ours, and not the pass's
		err = fmt.Errorf("no answer from the API server within %s", askTime)
	}
	return err
}

// says is the state of an attachment in words.
func (a attachmentAnswer) says() string {
	switch {
	case !a.ok:
		return "there is none"
	case a.is.Deleting && a.is.Attached:
		return "attached, being detached"
	case a.is.Deleting:
		return "being deleted"
	case a.is.Attached:
		return "attached"
	}
	return "not attached"
}

// evidence is the attachment, and whose volume it is.
func (a attachmentAnswer) evidence(expected string) []finding.Evidence {
	e := []finding.Evidence{{Source: "VolumeAttachment " + a.name, Observed: a.says(), Expected: expected}}
	if a.claim != "" {
		e = append(e, finding.Evidence{Source: "PersistentVolume " + shown(a.volume), Observed: "bound to the claim " + shown(a.claim)})
	} else if a.volume != "" {
		e = append(e, finding.Evidence{Source: "PersistentVolume " + shown(a.volume), Observed: "bound to no claim, or not there"})
	}
	return e
}

// label names a volume as operators know it.
func (a attachmentAnswer) label(v csiVolume) (subject, label string) {
	kind, name, in := "PersistentVolume", a.volume, shown(v.Driver)
	if name == "" {
		kind, name = "volume", v.Handle
	}
	if a.claim != "" {
		in = "claim " + shown(a.claim) + ", " + in
	}
	return shown(name), fmt.Sprintf("%s %s (%s)", kind, shown(name), in)
}

// clusterSays adds to a finding that the host alone makes what the cluster knows of
// the volume; nothing where it is none of those that are attached. named is the
// PersistentVolume where the finding has its name already.
func (p *diskPass) clusterSays(ctx context.Context, v csiVolume, named string) (says string, evidence []finding.Evidence) {
	if attached, inUse := p.lists(); !attached[v] && !inUse[v] {
		return "", nil
	}
	a, ok := p.ask(ctx, v, named)
	if !ok {
		return "", nil
	}
	did := "attached to"
	switch {
	case !a.ok || !a.is.Attached:
		did = "detached from"
	case a.is.Deleting:
		did = "begun to detach from"
	}
	var is []string
	if named == "" && a.volume != "" {
		is = append(is, "PersistentVolume "+shown(a.volume))
	}
	if a.claim != "" {
		is = append(is, "claim "+shown(a.claim))
	}
	says = fmt.Sprintf("; the volume is one that the cluster has %s this node", did)
	if len(is) > 0 {
		says = fmt.Sprintf("; it is %s, which the cluster has %s this node", strings.Join(is, ", "), did)
	}
	return says, a.evidence("")
}

// checkDetached judges a volume that is mounted for a pod and in use for the
// kubelet, and that the Node has no longer attached. The kubelet calls only
// volumes in use that a controller attaches, so that drivers without attachment
// do not come here.
func (p *diskPass) checkDetached(ctx context.Context, v csiVolume, m csiMount) {
	if strings.HasSuffix(m.Root, deletedRoot) {
		return // told already, as is the next
	}
	if d := p.deviceOf(m.mount); d != nil && d.Gone {
		return
	}
	a, ok := p.ask(ctx, v, m.data.PV)
	if !ok || a.ok && a.is.Attached && !a.is.Deleting {
		return
	}
	subject, label := a.label(v)
	state := "it has no VolumeAttachment"
	if a.ok {
		state = "its VolumeAttachment is " + a.says()
	}
	f := finding.Finding{
		Reason: "MountedVolumeDetached", Severity: finding.Critical, Subject: subject,
		Message: fmt.Sprintf("%s is mounted for a pod on this node, but the cluster has detached it from here (%s): another node may be given it, and two that write destroy a file system", label, state),
		Evidence: []finding.Evidence{
			{Source: m.Table, Observed: mountLine(m.mount)},
			{Source: "volumesInUse of the Node", Observed: shown(v.String())},
			{Source: "volumesAttached of the Node", Observed: "not in it", Expected: "in both"},
		},
	}
	f.Evidence = append(f.Evidence, a.evidence("attached")...)
	p.tell(f)
}

// checkMissing judges a volume that is attached and wanted by the kubelet, and of
// which nothing is mounted.
func (p *diskPass) checkMissing(ctx context.Context, v csiVolume) {
	a, ok := p.ask(ctx, v, "")
	if !ok || !a.ok || !a.is.Attached || a.is.Deleting {
		return
	}
	subject, label := a.label(v)
	where, evidence := p.deviceNamed(ctx, v, a.is.Metadata)
	p.tell(finding.Finding{
		Reason: "AttachedVolumeMissing", Severity: finding.Warning, Subject: subject,
		Message: fmt.Sprintf("%s is attached to this node and a pod waits for it, but it is not mounted here; %s", label, where),
		Evidence: slices.Concat([]finding.Evidence{
			{Source: "volumesAttached and volumesInUse of the Node", Observed: shown(v.String())},
			{Source: ownMountTable, Observed: "no mount of it", Expected: "one below plugins/kubernetes.io/csi or pods"},
		}, a.evidence("attached"), evidence),
	})
}

// checkLeftAttached judges a volume that is attached, and that neither the kubelet
// wants nor the host has mounted.
func (p *diskPass) checkLeftAttached(ctx context.Context, v csiVolume) {
	if p.Now.Sub(p.Memory.Since("attached "+v.String(), p.Now)) < p.LeftoverAfter.D() {
		return
	}
	a, ok := p.ask(ctx, v, "")
	if !ok || !a.ok {
		return
	}
	subject, label := a.label(v)
	f := finding.Finding{
		Reason: "LeftoverAttachment", Severity: finding.Info, Subject: subject,
		Message:  label + " is attached to this node, but nothing here uses it",
		Evidence: append([]finding.Evidence{{Source: "volumesAttached of the Node", Observed: shown(v.String()), Expected: "also in volumesInUse, or in neither"}}, a.evidence("none")...),
	}
	if a.is.DetachError != "" {
		f.Severity = finding.Warning
		f.Message += ", and its driver fails to detach it"
		f.Evidence = append(f.Evidence, finding.Evidence{Source: "detachError of the VolumeAttachment", Observed: shown(a.is.DetachError)})
	}
	p.tell(f)
}

// deviceNamed looks for a device that bears a volume's name: by what the driver's
// controller says of it, or in what udev calls the disks. Drivers differ, so this
// only says where to look on.
func (p *diskPass) deviceNamed(ctx context.Context, v csiVolume, metadata map[string]string) (where string, evidence []finding.Evidence) {
	ids := []string{v.Handle, path.Base(v.Handle)}
	for _, key := range slices.Sorted(maps.Keys(metadata)) {
		value := metadata[key]
		if !strings.HasPrefix(value, "/dev/") || path.Clean(value) != value {
			ids = append(ids, value)
			continue
		}
		e := finding.Evidence{Source: shown(value), Observed: "there"}
		if _, err := p.Host.Stat(ctx, value); errors.Is(err, fs.ErrNotExist) {
			e.Observed = "not there"
			e.Expected = "the device, by attachmentMetadata " + shown(key)
		}
		evidence = append(evidence, e)
	}
	const dir = "/dev/disk/by-id"
	links, err := p.Host.ReadDir(ctx, dir)
	if unlessGone(err) != nil {
		return "whether its device is here can not be seen", evidence
	}
	for _, link := range links {
		if partitionLink.MatchString(link) || !slices.ContainsFunc(ids, func(id string) bool { return bearsID(link, id) }) {
			continue
		}
		disk := link
		if dev, err := p.tree.resolve(ctx, dir+"/"+link); err == nil {
			if name, err := p.tree.byNumber(ctx, dev); err == nil {
				disk = name.Name
			}
		}
		return fmt.Sprintf("a disk that bears its name is here, %s, so the driver can not mount it", shown(disk)),
			append(evidence, finding.Evidence{Source: dir + "/" + shown(link), Observed: "bears the volume's name"})
	}
	return "no disk here bears its name", append(evidence, finding.Evidence{Source: dir, Observed: "no name with the volume's handle in it"})
}

// bearsID reports whether the name udev has for a disk holds the ID of a volume.
// Case and punctuation differ ("vol-0ab" is nvme-Amazon_Elastic_Block_Store_vol0ab),
// and virtio cuts a serial number off after 20 bytes (VIRTIO_BLK_ID_BYTES).
func bearsID(link, id string) bool {
	const least = 8 // shorter ones are in any name
	name, want := lettersAndDigits(link), lettersAndDigits(id)
	if len(want) < least {
		return false
	}
	if strings.Contains(name, want) {
		return true
	}
	serial, ok := strings.CutPrefix(link, "virtio-")
	return ok && len(serial) == 20 && strings.HasPrefix(id, serial)
}

func lettersAndDigits(s string) string {
	return strings.Map(func(r rune) rune {
		if !unicode.IsLetter(r) && !unicode.IsDigit(r) {
			return -1
		}
		return unicode.ToLower(r)
	}, s)
}

// checkedFolders are those of staged volumes as they were when every one was
// mounted or used.
type checkedFolders struct {
	mounts [2]int
	// folders are the drivers', each with the time of its last change.
	folders []changedFolder
}

type changedFolder struct {
	name    string
	inode   uint64
	changed time.Time
}

// checkStagingFolders looks for what the kubelet keeps of volumes that are neither
// mounted nor any pod's: the host alone tells. A kubelet that is down does not
// clean up, and that is not told.
func (p *diskPass) checkStagingFolders(ctx context.Context) {
	if p.mounts.Kubelet == nil || p.mounts.Partial {
		return
	}
	const key = "staging folders"
	root := p.mounts.Kubelet.RootDir + "/plugins/kubernetes.io/csi"
	now := checkedFolders{p.mounts.Version, p.driverFolders(ctx, root)}
	old, ok := Kept[checkedFolders](p.Memory, key)
	if ok && old.mounts == now.mounts && slices.Equal(old.folders, now.folders) {
		return
	}
	well := true
	for _, driver := range now.folders {
		well = p.checkDriverFolder(ctx, root, driver.name) && well
	}
	if well {
		p.Memory.Keep(key, now)
	} else {
		p.Memory.Keep(key, nil)
	}
}

func (p *diskPass) driverFolders(ctx context.Context, root string) []changedFolder {
	names, err := p.Host.ReadDir(ctx, root)
	p.fail(unlessGone(err))
	var folders []changedFolder
	for _, name := range names {
		if st, err := p.Host.Lstat(ctx, root+"/"+name); err == nil {
			folders = append(folders, changedFolder{name, st.Inode, st.ModTime})
		}
	}
	return folders
}

// checkDriverFolder judges the folders DRIVER/HASH, or volumeDevices/NAME of raw
// block volumes, and reports whether all are of volumes that are here.
func (p *diskPass) checkDriverFolder(ctx context.Context, root, driver string) (well bool) {
	names, err := p.Host.ReadDir(ctx, root+"/"+driver)
	if err != nil {
		p.fail(unlessGone(err))
		return false
	}
	well = true
	for _, name := range names {
		folder := driver + "/" + name
		raw := driver == "volumeDevices"
		if raw && (name == "staging" || name == "publish") || p.csi(ctx).staged[folder] {
			continue
		}
		dir := root + "/" + folder
		if raw {
			dir += "/data"
		}
		data, err := readVolumeData(ctx, p.Host, volume{Dir: dir, Plugin: "csi"})
		if err != nil {
			well = false
			p.fail(unlessGone(err))
			continue
		}
		v := csiVolume{data.Driver, data.Handle}
		// A driver need not mount what it stages.
		if _, used := p.csi(ctx).volumes[v]; used {
			continue
		}
		well = false
		if p.csi(ctx).unread || p.Now.Sub(p.Memory.Since("folder "+folder, p.Now)) < p.LeftoverAfter.D() {
			continue
		}
		if _, inUse := p.lists(); inUse[v] { // then that is told, or passes
			continue
		}
		p.tell(finding.Finding{
			Reason: "LeftoverDevice", Severity: finding.Info, Subject: shown(root + "/" + folder),
			Message:  fmt.Sprintf("the kubelet keeps a record of volume %s (%s), which is neither mounted here nor used by a pod", shown(v.Handle), shown(v.Driver)),
			Evidence: []finding.Evidence{{Source: shown(dir + "/vol_data.json"), Observed: "volumeHandle " + shown(v.Handle), Expected: "no file, or a mount of the volume"}},
		})
	}
	return well
}
