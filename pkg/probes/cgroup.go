package probes

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"path"
	"strconv"
	"strings"
	"syscall"

	"github.com/hosthygiene/agent/pkg/host"
)

// cgroupRoot is where every distribution mounts control groups.
const cgroupRoot = "/sys/fs/cgroup"

// cgroupTree knows where a control group's files are: in one directory with
// cgroup v2, in one for each controller with v1. A "hybrid" host (v1 with an
// empty v2 tree beside it) is v1, for its controllers are there.
type cgroupTree struct {
	files   host.Files
	unified bool
}

func openCgroups(ctx context.Context, files host.Files) (cgroupTree, error) {
	_, err := files.ReadFileMax(ctx, cgroupRoot+"/cgroup.controllers", maxAttribute)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return cgroupTree{}, err
	}
	return cgroupTree{files: files, unified: err == nil}, nil
}

// file is the path of a control group's file. The controller is the first part
// of its name: "pids.max" is in .../pids/ with v1.
func (t cgroupTree) file(cgroup, name string) string {
	if t.unified { // a control group's path begins with '/'
		return cgroupRoot + strings.TrimSuffix(cgroup, "/") + "/" + name
	}
	controller, _, _ := strings.Cut(name, ".")
	return path.Join(cgroupRoot, controller, cgroup, name)
}

// noLimit stands for "max".
const noLimit = int64(1<<63 - 1)

// number reads a file with one number or "max"; ok is false when it, or the
// control group, is not there.
func (t cgroupTree) number(ctx context.Context, cgroup, name string) (n int64, ok bool, err error) {
	file := t.file(cgroup, name)
	data, err := t.files.ReadFile(ctx, file)
	if err != nil {
		return 0, false, unlessGone(err)
	}
	n, err = parseLimit(data)
	if err != nil {
		return 0, false, fmt.Errorf("%s: %w", file, err)
	}
	return n, true, nil
}

// counter reads one counter of a file such as pids.events.
func (t cgroupTree) counter(ctx context.Context, cgroup, name, key string) (n int64, ok bool, err error) {
	file := t.file(cgroup, name)
	data, err := t.files.ReadFile(ctx, file)
	if err != nil {
		return 0, false, unlessGone(err)
	}
	n, ok, err = parseCounter(data, key)
	if err != nil {
		return 0, false, fmt.Errorf("%s: %w", file, err)
	}
	return n, ok, nil
}

// parseLimit parses a decimal number or "max".
func parseLimit(data []byte) (int64, error) {
	text := string(bytes.TrimSpace(data))
	if text == "max" {
		return noLimit, nil
	}
	n, err := strconv.ParseInt(text, 10, 64)
	if err != nil || n < 0 {
		return 0, fmt.Errorf("%.40q is neither a number nor \"max\"", text)
	}
	return n, nil
}

// parseCounter finds a key in a flat-keyed file: "max 7\n" (pids.events), "low
// 0\n...oom_kill 3\n" (memory.events), and /proc/vmstat, which looks the same.
func parseCounter(data []byte, key string) (n int64, ok bool, err error) {
	for len(data) > 0 {
		var line []byte
		line, data, _ = bytes.Cut(data, []byte("\n"))
		name, value, _ := bytes.Cut(line, []byte(" "))
		if string(name) != key {
			continue
		}
		n, err = strconv.ParseInt(string(bytes.TrimSpace(value)), 10, 64)
		if err != nil || n < 0 {
			return 0, false, fmt.Errorf("%s: %.40q is no count", key, value)
		}
		return n, true, nil
	}
	return 0, false, nil
}

// procCgroup is the control groups of a process.
type procCgroup struct {
	// path is the one that counts pids and memory: the v2 one, or that of the
	// memory controller with v1.
	path string
	// pids is that of the pids controller.
	pids string
}

// parseProcCgroup parses /proc/PID/cgroup, "ID:CONTROLLERS:PATH" lines
// (cgroups(7)); a path may contain ':' itself. A v1 host lists its controllers
// and at most an empty "0::" line beside them.
func parseProcCgroup(data []byte) procCgroup {
	var c procCgroup
	var v2, systemd string
	for line := range strings.Lines(string(data)) {
		id, rest, _ := strings.Cut(strings.TrimSuffix(line, "\n"), ":")
		controllers, p, ok := strings.Cut(rest, ":")
		if !ok || !strings.HasPrefix(p, "/") {
			continue
		}
		switch {
		case id == "0" && controllers == "":
			v2 = p
		case controllers == "name=systemd":
			systemd = p
		default:
			for name := range strings.SplitSeq(controllers, ",") {
				switch name {
				case "memory":
					c.path = p
				case "pids":
					c.pids = p
				}
			}
		}
	}
	// On a hybrid host without the memory controller systemd's own tree still
	// tells which unit or pod a process belongs to.
	for _, p := range []*string{&c.path, &c.pids} {
		switch {
		case *p != "":
		case systemd != "":
			*p = systemd
		default:
			*p = v2
		}
	}
	return c
}

// Quality-of-service classes as they stand in the names of control groups.
const (
	qosGuaranteed = "Guaranteed"
	qosBurstable  = "Burstable"
	qosBestEffort = "BestEffort"
)

// podCgroup is what the name of a control group tells about the pod and the
// container in it. UID is empty for what is not in a pod.
type podCgroup struct {
	// UID is the pod's, with dashes; that of a static pod is a hash.
	UID string
	// QOS is the class.
	QOS string
	// Container is the runtime's ID of the container; empty in the pod's own
	// control group and for the runtime's helpers in it.
	Container string
}

func (c procCgroup) pod() podCgroup { return parsePodCgroup(c.path) }

// parsePodCgroup takes the names that the kubelet and the runtimes give apart:
//
//	/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod<UID with _>.slice/cri-containerd-<ID>.scope
//	/kubepods/besteffort/pod<UID>/<ID>
//	/system.slice/containerd.service/kubepods-burstable-pod<UID with _>.slice:cri-containerd:<ID>
//
// with more levels above (--cgroup-root) and below (a container that has control
// groups of its own).
func parsePodCgroup(name string) podCgroup {
	parts := strings.FieldsFunc(name, func(c rune) bool { return c == '/' || c == ':' })
	kubepods, qos := false, qosGuaranteed
	for i, part := range parts {
		slice, systemd := strings.CutSuffix(part, ".slice")
		switch {
		case !systemd && part == "kubepods", systemd && (slice == "kubepods" || strings.HasSuffix(slice, "-kubepods")):
			kubepods = true
			continue
		case kubepods && (part == "burstable" || strings.HasSuffix(slice, "kubepods-burstable")):
			qos = qosBurstable
			continue
		case kubepods && (part == "besteffort" || strings.HasSuffix(slice, "kubepods-besteffort")):
			qos = qosBestEffort
			continue
		}
		uid, ok := "", false
		if systemd {
			_, rest, in := strings.Cut(slice, "kubepods-")
			if !in {
				continue
			}
			switch {
			case strings.HasPrefix(rest, "burstable-"):
				qos, rest = qosBurstable, rest[len("burstable-"):]
			case strings.HasPrefix(rest, "besteffort-"):
				qos, rest = qosBestEffort, rest[len("besteffort-"):]
			}
			uid, ok = strings.CutPrefix(rest, "pod")
			uid = strings.ReplaceAll(uid, "_", "-")
		} else if kubepods {
			uid, ok = strings.CutPrefix(part, "pod")
		}
		if !ok || uid == "" {
			continue
		}
		p := podCgroup{UID: uid, QOS: qos}
		rest := parts[i+1:]
		if len(rest) > 1 && (rest[0] == "cri-containerd" || rest[0] == "docker") {
			rest = rest[1:] // the runtime's name between colons
		}
		if len(rest) > 0 {
			p.Container = containerID(rest[0])
		}
		return p
	}
	return podCgroup{}
}

// containerID takes the ID out of "cri-containerd-<ID>.scope",
// "crio-<ID>.scope", "docker-<ID>.scope" or "<ID>". CRI-O's monitor of a
// container, "crio-conmon-<ID>.scope", is no container.
func containerID(name string) string {
	id := strings.TrimSuffix(name, ".scope")
	if strings.HasPrefix(id, "crio-conmon-") {
		return ""
	}
	if i := strings.LastIndexByte(id, '-'); i >= 0 {
		id = id[i+1:]
	}
	if len(id) < 12 || strings.Trim(id, "0123456789abcdef") != "" {
		return ""
	}
	return id
}

// findKubepods returns the control group that holds every pod, "" when there is
// none. The kubelet's own idea of its driver is a hint only, for it takes the
// container runtime's since 1.34, and a switch of drivers leaves the old group
// behind: of those there, the one with tasks in it counts.
func (t cgroupTree) findKubepods(ctx context.Context, c KubeletConfig, podProcess func() string) (string, error) {
	var found string
	var most int64 = -1
	for _, name := range kubepodsNames(c.CgroupRoot) {
		n, ok, err := t.number(ctx, name, "pids.current")
		if err != nil {
			return "", err
		}
		if ok && n > most {
			found, most = name, n
		}
	}
	if found != "" {
		return found, nil
	}
	return kubepodsAbove(podProcess()), nil
}

// kubepodsNames lists what kubepods may be called below a --cgroup-root: the
// name of systemd's driver, which spells the whole path out on every level, and
// that of cgroupfs.
func kubepodsNames(root string) []string {
	parts := strings.FieldsFunc(root, func(c rune) bool { return c == '/' })
	slice, prefix := "", ""
	for _, part := range append(parts, "kubepods") {
		// escapeSystemdCgroupName of kubernetes pkg/kubelet/cm
		prefix += strings.ReplaceAll(part, "-", "_")
		slice += "/" + prefix + ".slice"
		prefix += "-"
	}
	return []string{slice, path.Join("/", root, "kubepods")}
}

// kubepodsAbove cuts the path of a pod's process behind the part that is called
// kubepods.
func kubepodsAbove(name string) string {
	parts := strings.Split(name, "/")
	for i := len(parts) - 1; i >= 0; i-- {
		part := strings.TrimSuffix(parts[i], ".slice")
		if part == "kubepods" || strings.HasSuffix(part, "-kubepods") && part != parts[i] {
			return strings.Join(parts[:i+1], "/")
		}
	}
	return ""
}

// unlessGone drops the errors of a control group or process that is not there:
// ENODEV and ESRCH are what an open file of a removed one gives.
func unlessGone(err error) error {
	if isGone(err) {
		return nil
	}
	return err
}

// isGone reports whether an error says that a file, process or control group is
// not there, or no longer.
func isGone(err error) bool {
	return errors.Is(err, fs.ErrNotExist) || errors.Is(err, syscall.ENODEV) || errors.Is(err, syscall.ESRCH) ||
		errors.Is(err, syscall.ENOTDIR) // "tasks/pids.events": an attribute taken for a group
}
