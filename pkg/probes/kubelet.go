package probes

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"path"
	"slices"
	"strconv"
	"strings"
	"time"

	jsonpatch "github.com/evanphx/json-patch/v5"
	"github.com/moby/sys/mountinfo"
	"k8s.io/apimachinery/pkg/api/resource"
	"sigs.k8s.io/yaml"

	"github.com/hosthygiene/agent/pkg/host"
)

// Kubelet is the process that runs this node's pods, as its entry in /proc
// describes it. Several probes need to know it; none of them talks to it.
type Kubelet struct {
	// PID is the process, of the kubelet itself or of what it is built into.
	PID int
	// StartTicks tells it from another process that had the PID.
	StartTicks uint64
	// Program is "kubelet", or what it is built into: "k3s", "kubelite",
	// "hyperkube".
	Program string
	// Flags are the kubelet's, whatever way they were given.
	Flags KubeletFlags
	// FlagsUnseen says why Flags may lack some; empty when they are all there.
	FlagsUnseen string
	// RootDir holds the pods' volumes, /var/lib/kubelet unless a flag moves it.
	RootDir string
	// OwnMounts: the kubelet lives in a mount namespace other than PID 1's
	// (OpenShift's kubens, a containerised kubelet), so that PID 1's mount
	// table lacks the pods' volumes: they stand in MountInfo.
	OwnMounts bool
	// OwnRoot: its root file system is another one too, so that the paths in
	// its flags do not lead to its files in the host's tree.
	OwnRoot bool
}

// MountInfo is the path of the kubelet's own mount table.
func (k Kubelet) MountInfo() string { return procFile(k.PID, "mountinfo") }

func procFile(pid int, name string) string {
	return "/proc/" + strconv.Itoa(pid) + "/" + name
}

// kubeletProgram maps a process name to the program it is, "" for any other. k3s re-executes
// itself as k3s-server or k3s-agent; rke2 and k0s start a kubelet of its own.
func kubeletProgram(comm string) string {
	switch comm {
	case "kubelet", "hyperkube", "kubelite":
		return comm
	case "k3s", "k3s-server", "k3s-agent":
		return "k3s"
	}
	return ""
}

// FindKubelet looks the kubelet up in the process table; ok is false where none
// runs, which is a fact and no error. An error beside ok says what about it
// could not be seen.
func FindKubelet(ctx context.Context, v host.View) (k Kubelet, ok bool, err error) {
	procs, err := processesNamed(ctx, v, func(comm string) bool { return kubeletProgram(comm) != "" }, false)
	if err != nil {
		return Kubelet{}, false, fmt.Errorf("process table: %w", err)
	}
	p, ok := kubeletAmong(ctx, v, procs)
	if !ok {
		return Kubelet{}, false, nil
	}
	k = Kubelet{PID: p.PID, StartTicks: p.StartTicks, Program: kubeletProgram(p.Comm), RootDir: "/var/lib/kubelet"}
	var errs []error
	if k.OwnMounts, err = ownMounts(ctx, v, p.PID); err != nil {
		errs = append(errs, fmt.Errorf("mount namespace of the kubelet: %w", err))
	}
	if k.OwnMounts {
		if k.OwnRoot, err = ownRoot(ctx, v, p.PID); err != nil {
			errs = append(errs, fmt.Errorf("mount table of the kubelet: %w", err))
		}
	}
	switch err := k.readFlags(ctx, v); {
	case isGone(err): // it has ended since the process table was read
		return Kubelet{}, false, nil
	case err != nil:
		k.FlagsUnseen = "its command line could not be read"
		errs = append(errs, fmt.Errorf("flags of the kubelet: %w", err))
	}
	if dir := k.Flags.Last("root-dir"); dir != "" {
		k.RootDir = k.resolve(ctx, v, dir)
	}
	return k, true, errors.Join(errs...)
}

// findKubelet is [FindKubelet] for a probe: it is looked for anew when the
// processes that go by its name are others, and after seldomFor.
func findKubelet(ctx context.Context, in Input) (k Kubelet, ok bool, err error) {
	procs, err := in.Host.Processes(ctx)
	if err != nil {
		return Kubelet{}, false, fmt.Errorf("process table: %w", err)
	}
	type process struct {
		pid   int
		start uint64
	}
	type found struct {
		kubelet Kubelet
		among   []process
		at      time.Time
	}
	var among []process
	for _, p := range procs {
		if kubeletProgram(p.Comm) != "" {
			among = append(among, process{p.PID, p.StartTicks})
		}
	}
	const key = "the kubelet"
	if kept, was := Kept[found](in.Memory, key); was && slices.Equal(kept.among, among) && !elapsed(in.Now, kept.at, seldomFor) {
		return kept.kubelet, true, nil
	}
	if k, ok, err = FindKubelet(ctx, in.Host); ok && err == nil {
		in.Memory.Keep(key, found{k, among, in.Now})
	}
	return k, ok, err
}

// kubeletAmong picks the kubelet from the processes that have its name. Any process may take
// its name, and pods may run one (kind, kubemark, virtual clusters): those in a
// pod's cgroup are not this node's, root's come before others', the oldest
// before later ones, for a kubelet forks short-lived helpers under its own name.
func kubeletAmong(ctx context.Context, v host.View, procs []host.Process) (host.Process, bool) {
	type candidate struct {
		host.Process
		root bool
	}
	var found []candidate
	for _, p := range procs {
		if p.Kernel || p.State == 'Z' {
			continue
		}
		if data, err := v.ReadFile(ctx, procFile(p.PID, "cgroup")); err == nil && parseProcCgroup(data).pod().UID != "" {
			continue
		}
		// execve(2) gives a process its name before its arguments, and one without
		// any would be taken for a kubelet that has every setting's default.
		if data, err := v.ReadFileMax(ctx, procFile(p.PID, "cmdline"), maxCmdline); err == nil && len(data) == 0 {
			continue
		}
		st, err := v.Stat(ctx, "/proc/"+strconv.Itoa(p.PID))
		found = append(found, candidate{p, err == nil && st.UID == 0})
	}
	if len(found) == 0 {
		return host.Process{}, false
	}
	best := slices.MinFunc(found, func(a, b candidate) int {
		if a.root != b.root {
			if a.root {
				return -1
			}
			return 1
		}
		return cmp.Or(cmp.Compare(a.StartTicks, b.StartTicks), cmp.Compare(a.PID, b.PID))
	})
	return best.Process, true
}

// ownMounts compares the mount namespaces of a process and of PID 1. A missing
// link is a process that ended or a tree without namespaces.
func ownMounts(ctx context.Context, v host.Files, pid int) (bool, error) {
	its, err := v.ReadLink(ctx, procFile(pid, "ns/mnt"))
	if err != nil {
		return false, unlessGone(err)
	}
	first, err := v.ReadLink(ctx, procFile(1, "ns/mnt"))
	if err != nil {
		return false, unlessGone(err)
	}
	return its != first, nil
}

// ownRoot tells a kubelet in a container from one that merely has a mount
// namespace of its own over the same root file system.
func ownRoot(ctx context.Context, v host.Files, pid int) (bool, error) {
	its, err := rootMount(ctx, v, pid)
	if err != nil {
		return true, err
	}
	first, err := rootMount(ctx, v, 1)
	if err != nil {
		return true, err
	}
	return its != first, nil
}

type rootOf struct {
	major, minor int
	root         string
}

func rootMount(ctx context.Context, v host.Files, pid int) (rootOf, error) {
	data, err := v.ReadFile(ctx, procFile(pid, "mountinfo"))
	if err != nil {
		return rootOf{}, err
	}
	mounts, err := mountinfo.GetMountsFromReader(bytes.NewReader(data), func(m *mountinfo.Info) (skip, stop bool) {
		return m.Mountpoint != "/", false
	})
	if err != nil {
		return rootOf{}, fmt.Errorf("%s: %w", procFile(pid, "mountinfo"), err)
	}
	if len(mounts) == 0 {
		return rootOf{}, fmt.Errorf("%s: no root file system in it", procFile(pid, "mountinfo"))
	}
	top := mounts[len(mounts)-1] // what is mounted over another comes later
	return rootOf{top.Major, top.Minor, top.Root}, nil
}

// readFlags finds the kubelet's flags: on its command line, or in the file a
// program it is built into takes them from.
func (k *Kubelet) readFlags(ctx context.Context, v host.Files) error {
	if k.Program == "k3s" {
		// k3s overwrites its command line so that no token shows in it, and
		// its config.yaml holds the token beside the kubelet's arguments.
		k.FlagsUnseen = "k3s hides the flags of the kubelet it contains, and its configuration file holds the cluster token, which is not read"
		return nil
	}
	data, err := v.ReadFileMax(ctx, procFile(k.PID, "cmdline"), maxCmdline)
	if err != nil {
		return err
	}
	argv := splitCmdline(data)
	k.Flags = parseKubeletFlags(argv)
	if k.Program != "kubelite" {
		return nil
	}
	// MicroK8s: one process for every component, each with a file of its flags.
	name := k.Flags.Last("kubelet-args-file")
	if name == "" {
		k.FlagsUnseen = "kubelite names no --kubelet-args-file"
		return nil
	}
	if k.OwnRoot {
		k.FlagsUnseen = "its root file system is not the host's"
		return nil
	}
	text, err := v.ReadFileMax(ctx, k.resolve(ctx, v, name), maxCmdline)
	if err != nil {
		k.FlagsUnseen = fmt.Sprintf("the file of its flags could not be read: %v", err)
		return nil
	}
	k.Flags = parseKubeletFlags(argsFile(text, path.Dir(path.Dir(name))))
	return nil
}

// maxCmdline is more than any command line a person or a tool writes; a process
// can make its own as long as the stack allows.
const maxCmdline = 256 << 10

// resolve makes a path of the kubelet's absolute: it means its own working
// directory, "/" for every unit that does not say otherwise.
func (k Kubelet) resolve(ctx context.Context, v host.Files, name string) string {
	if path.IsAbs(name) {
		return path.Clean(name)
	}
	cwd, err := v.ReadLink(ctx, procFile(k.PID, "cwd"))
	if err != nil || !path.IsAbs(cwd) {
		cwd = "/"
	}
	return path.Join(cwd, name)
}

// configFiles are the file and the directory of drop-ins (with '/' at its end)
// that the kubelet reads its configuration from when it starts.
func (k Kubelet) configFiles(ctx context.Context, v host.Files) []string {
	var names []string
	if file := k.Flags.Last("config"); file != "" && !k.OwnRoot {
		names = append(names, k.resolve(ctx, v, file))
	}
	if dir := k.Flags.Last("config-dir"); dir != "" && !k.OwnRoot {
		names = append(names, k.resolve(ctx, v, dir)+"/")
	}
	return names
}

// Kubeconfig is the kubelet's kubeconfig file, "" where it is not known or does
// not lie in the host's tree.
func (k Kubelet) Kubeconfig(ctx context.Context, v host.Files) string {
	file := k.Flags.Last("kubeconfig")
	if file == "" || k.OwnRoot {
		return ""
	}
	return k.resolve(ctx, v, file)
}

// certDir holds the certificates that the kubelet renews or makes itself.
func (k Kubelet) certDir(ctx context.Context, v host.Files) string {
	if d := k.Flags.Last("cert-dir"); d != "" {
		return k.resolve(ctx, v, d)
	}
	return path.Join(k.RootDir, "pki")
}

// servingFiles are where the certificate of port 10250 may lie: the first that
// is there is in use. tlsCertFile is what the configuration names.
func (k Kubelet) servingFiles(ctx context.Context, v host.Files, tlsCertFile string) []string {
	dir := k.certDir(ctx, v)
	files := []string{dir + "/kubelet-server-current.pem", dir + "/kubelet.crt"}
	if tlsCertFile != "" && tlsCertFile != files[1] {
		return []string{k.resolve(ctx, v, tlsCertFile)}
	}
	return files
}

// KubeletServingFiles are where the kubelet of this host may have the certificate
// of port 10250, by its flags and configuration as far as they can be seen: AKS
// keeps it in /etc/kubernetes/certs, RKE2 below /var/lib/rancher.
func KubeletServingFiles(ctx context.Context, v host.View) []string {
	k, ok, _ := FindKubelet(ctx, v)
	if !ok || k.OwnRoot {
		k = Kubelet{RootDir: "/var/lib/kubelet"}
	}
	// What can not be read is told by the probes; the default files are left.
	config, _ := k.ConfigOnRestart(ctx, v)
	return k.servingFiles(ctx, v, config.TLSCertFile)
}

// splitCmdline splits /proc/PID/cmdline, whose arguments end in NUL bytes.
func splitCmdline(data []byte) []string {
	data = bytes.TrimRight(data, "\x00")
	if len(data) == 0 {
		return nil
	}
	return strings.Split(string(data), "\x00")
}

// argsFile splits a MicroK8s file of flags: one a line, comments, and the two
// directories of the snap as variables.
func argsFile(text []byte, snapData string) []string {
	vars := strings.NewReplacer(
		"${SNAP_DATA}", snapData, "$SNAP_DATA", snapData,
		"${SNAP_COMMON}", path.Join(path.Dir(snapData), "common"), "$SNAP_COMMON", path.Join(path.Dir(snapData), "common"),
	)
	argv := []string{"kubelet"}
	for line := range strings.Lines(string(text)) {
		line = strings.TrimSpace(line)
		if line == "" || line[0] == '#' {
			continue
		}
		for _, f := range strings.Fields(line) {
			argv = append(argv, strings.Trim(vars.Replace(f), `"'`))
		}
	}
	return argv
}

// KubeletFlags are command-line flags by name, without dashes in front, with
// every value given, in order.
type KubeletFlags map[string][]string

// Last is the value in force of a flag that holds one.
func (f KubeletFlags) Last(name string) string {
	if vs := f[name]; len(vs) > 0 {
		return vs[len(vs)-1]
	}
	return ""
}

// valueFlags are the flags read here that take a value: the argument behind
// them is theirs even when it begins with '-', as in "--oom-score-adj -999".
var valueFlags = []string{
	"cgroup-driver", "cgroup-root", "config", "config-dir", "container-runtime-endpoint",
	"cert-dir", "enforce-node-allocatable", "eviction-hard", "eviction-soft", "feature-gates", "kube-reserved", "kubelet-args-file", "max-pods", "oom-score-adj",
	"kubeconfig", "pod-max-pids", "root-dir", "system-reserved", "tls-cert-file", "volume-plugin-dir",
}

// parseKubeletFlags parses an argument vector as pflag does: "--x=y", "--x y",
// and '_' for '-' in names (WordSepNormalizeFunc of k8s.io/component-base).
// Which of the other flags are booleans need not be known: the kubelet takes no
// arguments but flags, so what follows a flag without a dash is its value.
func parseKubeletFlags(argv []string) KubeletFlags {
	flags := KubeletFlags{}
	for i := 1; i < len(argv); i++ {
		arg, ok := strings.CutPrefix(argv[i], "--")
		if !ok {
			continue
		}
		if arg == "" { // "--" ends the flags
			break
		}
		name, value, given := strings.Cut(arg, "=")
		name = strings.ReplaceAll(name, "_", "-")
		if !given {
			value = "true"
			if i+1 < len(argv) && (slices.Contains(valueFlags, name) || !strings.HasPrefix(argv[i+1], "-")) {
				i++
				value = argv[i]
			}
		}
		flags[name] = append(flags[name], value)
	}
	return flags
}

// KubeletConfig is the part of the kubelet's configuration that decides about
// limits, scores and paths; defaults are filled in.
type KubeletConfig struct {
	// Source says where it was read, for evidence.
	Source string
	// SystemReservedPIDs and KubeReservedPIDs are the "pid" entries of
	// systemReserved and kubeReserved.
	SystemReservedPIDs, KubeReservedPIDs int64
	// EnforcePods: what is reserved is subtracted from the limit of kubepods
	// (enforceNodeAllocatable contains "pods").
	EnforcePods bool
	// PodPIDsLimit per pod; 0 or less: none.
	PodPIDsLimit int64
	MaxPods      int64
	OOMScoreAdj  int64
	// CgroupRoot is below which kubepods lies; CgroupsPerQOS false: there is none.
	CgroupRoot    string
	CgroupsPerQOS bool
	// CgroupDriver is "systemd" or "cgroupfs"; recent kubelets ask the
	// container runtime instead, so it is a hint.
	CgroupDriver string
	// RuntimeEndpoint is the container runtime's socket, "unix:///run/...".
	RuntimeEndpoint string
	// TLSCertFile is the certificate of port 10250; empty: one of its own in
	// RootDir/pki.
	TLSCertFile string
	// VolumePluginDir is where FlexVolume drivers are looked for.
	VolumePluginDir string
	// FeatureGates are those that are set, whatever to.
	FeatureGates map[string]bool
	// FailSwapOn: it does not start on a host with swap. SwapBehavior says what
	// pods may use of it: "", "NoSwap", "LimitedSwap".
	FailSwapOn   bool
	SwapBehavior string
	// EvictsForPIDs: an eviction threshold, hard or soft, is on pid.available.
	EvictsForPIDs bool
	// ReservesMemory: systemReserved or kubeReserved has an entry for memory.
	ReservesMemory bool
	// AllowsCgroupV1: failCgroupV1 is set to false. Not set, the version decides.
	AllowsCgroupV1 bool
}

// ReservedPIDs is what pods are to leave to the host.
func (c KubeletConfig) ReservedPIDs() int64 { return c.SystemReservedPIDs + c.KubeReservedPIDs }

// maxKubeletConfig is the limit of one configuration file, in bytes.
const maxKubeletConfig = 1 << 20

// kubeletFileConfig is the kubelet's configuration file as far as it is read
// here (k8s.io/kubelet/config/v1beta1).
type kubeletFileConfig struct {
	SystemReserved         map[string]looseString `json:"systemReserved"`
	KubeReserved           map[string]looseString `json:"kubeReserved"`
	EnforceNodeAllocatable []string               `json:"enforceNodeAllocatable"`
	PodPidsLimit           *int64                 `json:"podPidsLimit"`
	MaxPods                *int64                 `json:"maxPods"`
	OOMScoreAdj            *int64                 `json:"oomScoreAdj"`
	CgroupRoot             string                 `json:"cgroupRoot"`
	CgroupsPerQOS          *bool                  `json:"cgroupsPerQOS"`
	CgroupDriver           string                 `json:"cgroupDriver"`
	RuntimeEndpoint        string                 `json:"containerRuntimeEndpoint"`
	TLSCertFile            string                 `json:"tlsCertFile"`
	VolumePluginDir        string                 `json:"volumePluginDir"`
	FeatureGates           map[string]bool        `json:"featureGates"`
	FailSwapOn             *bool                  `json:"failSwapOn"`
	FailCgroupV1           *bool                  `json:"failCgroupV1"`
	MemorySwap             struct {
		SwapBehavior string `json:"swapBehavior"`
	} `json:"memorySwap"`
	EvictionHard map[string]looseString `json:"evictionHard"`
	EvictionSoft map[string]looseString `json:"evictionSoft"`
}

// evictsForPIDs reports whether a map of thresholds has the one for PIDs
// (kubernetes pkg/kubelet/eviction/api). None of the defaults is for PIDs.
func evictsForPIDs(thresholds map[string]looseString) bool {
	_, ok := thresholds["pid.available"]
	return ok
}

// defaultVolumePluginDir is DefaultVolumePluginDir of kubernetes
// pkg/kubelet/apis/config/v1beta1.
const defaultVolumePluginDir = "/usr/libexec/kubernetes/kubelet-plugins/volume/exec"

// reservesMemory reports whether a reservation has memory that is more than none.
func reservesMemory(reserved map[string]looseString) bool {
	return strings.Trim(string(reserved["memory"]), "0") != ""
}

// looseString takes a number as well: "pid: 1000" without quotes is what people
// write. A kubelet refuses it, but it may be running with an older file.
type looseString string

func (s *looseString) UnmarshalJSON(data []byte) error {
	if len(data) > 0 && (data[0] == '-' || data[0] >= '0' && data[0] <= '9') {
		*s = looseString(data)
		return nil
	}
	return json.Unmarshal(data, (*string)(s))
}

// ConfigOnRestart reads the configuration the kubelet would have if it were
// started now with the flags it has: defaults, the --config file, the *.conf
// files of --config-dir in lexical order, flags, the later over the earlier.
// The running one may have started from other files: see [LiveKubeletConfig].
func (k Kubelet) ConfigOnRestart(ctx context.Context, v host.Files) (KubeletConfig, error) {
	f, err := k.readConfigFiles(ctx, v)
	if err != nil {
		return KubeletConfig{}, err
	}
	return k.merge(f)
}

// configOnRestart is [Kubelet.ConfigOnRestart] for a probe, which reads the files
// in every pass and takes them apart when one is another.
func (k Kubelet) configOnRestart(ctx context.Context, in Input) (KubeletConfig, error) {
	f, err := k.readConfigFiles(ctx, in.Host)
	if err != nil {
		return KubeletConfig{}, err
	}
	const key = "kubelet config"
	kept, ok := Kept[mergedKubelet](in.Memory, key)
	if !ok || !slices.EqualFunc(f.files, kept.from.files, kubeletFile.equal) || !slices.Equal(f.source, kept.from.source) || !maps.EqualFunc(k.Flags, kept.flags, slices.Equal) {
		kept = mergedKubelet{from: f, flags: k.Flags}
		kept.config, kept.err = k.merge(f)
		in.Memory.Keep(key, kept)
	}
	return kept.config, kept.err
}

// kubeletFiles are the files of a configuration, the later over the earlier.
type kubeletFiles struct {
	files []kubeletFile
	// source names them for people.
	source []string
}

type kubeletFile struct {
	name string
	data []byte
}

func (f kubeletFile) equal(g kubeletFile) bool {
	return f.name == g.name && bytes.Equal(f.data, g.data)
}

// mergedKubelet is what came of files and flags. The config is shared by passes
// and not changed.
type mergedKubelet struct {
	from   kubeletFiles
	flags  KubeletFlags
	config KubeletConfig
	err    error
}

func (k Kubelet) readConfigFiles(ctx context.Context, v host.Files) (f kubeletFiles, err error) {
	if k.FlagsUnseen != "" {
		return f, fmt.Errorf("configuration of the kubelet: %s", k.FlagsUnseen)
	}
	file, dir := k.Flags.Last("config"), k.Flags.Last("config-dir")
	if k.OwnRoot && (file != "" || dir != "") {
		return f, errors.New("configuration of the kubelet: it runs in a container with a root file system of its own, where its files can not be seen")
	}
	read := func(name string) error {
		data, err := v.ReadFileMax(ctx, name, maxKubeletConfig)
		if err != nil {
			return fmt.Errorf("configuration of the kubelet: %w", err)
		}
		f.files = append(f.files, kubeletFile{name, data})
		return nil
	}
	if file != "" {
		file = k.resolve(ctx, v, file)
		if err := read(file); err != nil {
			return f, err
		}
		f.source = append(f.source, file)
	}
	if dir != "" {
		dir = k.resolve(ctx, v, dir)
		names, err := dropIns(ctx, v, dir)
		if err != nil {
			return f, fmt.Errorf("configuration of the kubelet: %w", err)
		}
		for _, name := range names {
			if err := read(name); err != nil {
				return f, err
			}
		}
		f.source = append(f.source, fmt.Sprintf("%d drop-in files in %s", len(names), dir))
	}
	return f, nil
}

func (k Kubelet) merge(f kubeletFiles) (KubeletConfig, error) {
	merged := []byte("{}")
	for _, file := range f.files {
		var err error
		if merged, err = mergeKubeletConfig(merged, file.data); err != nil {
			return KubeletConfig{}, fmt.Errorf("configuration of the kubelet: %s: %w", file.name, err)
		}
	}
	c, err := decodeKubeletConfig(merged)
	if err != nil {
		return KubeletConfig{}, fmt.Errorf("configuration of the kubelet: %w", err)
	}
	used, err := c.override(k.Flags)
	if err != nil {
		return KubeletConfig{}, fmt.Errorf("flags of the kubelet: %w", err)
	}
	source := f.source
	if used || len(source) == 0 {
		source = append(slices.Clip(source), "flags")
	}
	c.Source = strings.Join(source, ", ")
	return c, nil
}

// mergeKubeletConfig lays one YAML or JSON file over a JSON document as a JSON
// merge patch (RFC 7386), as the kubelet does: maps merge, lists are replaced,
// null goes back to the default.
func mergeKubeletConfig(base, file []byte) ([]byte, error) {
	patch, err := yaml.YAMLToJSON(file)
	if err != nil {
		return nil, errors.New("not valid YAML") // the parser's message quotes the file
	}
	if patch = bytes.TrimSpace(patch); bytes.Equal(patch, []byte("null")) { // an empty file
		return base, nil
	}
	if len(patch) == 0 || patch[0] != '{' {
		return nil, errors.New("not a mapping of settings")
	}
	merged, err := jsonpatch.MergePatch(base, patch)
	if err != nil {
		return nil, errors.New("can not be merged with what comes before it")
	}
	return merged, nil
}

// maxDropIns is more than any tool writes; a directory beyond it is a mistake
// such as --config-dir=/etc.
const maxDropIns = 1000

// dropIns lists the *.conf files below dir in the order filepath.WalkDir visits
// them. It begins with lstat, so a directory that is a symlink holds none.
func dropIns(ctx context.Context, v host.Files, dir string) ([]string, error) {
	st, err := v.Lstat(ctx, dir)
	if err != nil {
		return nil, err
	}
	if !st.Mode.IsDir() {
		return nil, nil
	}
	var names []string
	seen := 0
	var walk func(dir string) error
	walk = func(dir string) error {
		entries, err := v.ReadDir(ctx, dir)
		if err != nil {
			return err
		}
		for _, name := range entries {
			if seen++; seen > 10*maxDropIns || len(names) > maxDropIns {
				return fmt.Errorf("%s: far too many files for a drop-in directory", dir)
			}
			full := path.Join(dir, name)
			st, err := v.Lstat(ctx, full)
			switch {
			case err != nil:
				return err
			case st.Mode.IsDir():
				if err := walk(full); err != nil {
					return err
				}
			case path.Ext(name) == ".conf":
				names = append(names, full)
			}
		}
		return nil
	}
	return names, walk(dir)
}

// liveKubelet is the answer of one process; it does not change while it lives.
type liveKubelet struct {
	pid    int
	start  uint64
	config KubeletConfig
	err    error
	at     time.Time
}

// runningConfig is [LiveKubeletConfig] for a probe: a kubelet has the
// configuration it started with until it ends. One that has not answered is asked
// again after a while.
func (k Kubelet) runningConfig(ctx context.Context, in Input, again time.Duration) (KubeletConfig, error) {
	const key = "live"
	live, ok := Kept[liveKubelet](in.Memory, key)
	if !ok || live.pid != k.PID || live.start != k.StartTicks || live.err != nil && elapsed(in.Now, live.at, again) {
		live = liveKubelet{pid: k.PID, start: k.StartTicks, at: in.Now}
		live.config, live.err = LiveKubeletConfig(ctx, in.Host)
		in.Memory.Keep(key, live)
	}
	return live.config, live.err
}

// LiveKubeletConfig asks the running kubelet for the configuration it has
// (GET /configz). The error wraps host.ErrNotConfigured outside a cluster.
func LiveKubeletConfig(ctx context.Context, v host.View) (KubeletConfig, error) {
	const source = "kubelet /configz"
	var c KubeletConfig
	err := v.KubeletAPI(ctx, "/configz", func(r io.Reader) error {
		data, err := io.ReadAll(io.LimitReader(r, maxKubeletConfig+1))
		if err == nil && len(data) > maxKubeletConfig {
			err = host.ErrTooLarge
		}
		if err == nil {
			c, err = parseConfigz(data)
		}
		return err
	})
	if err != nil {
		return KubeletConfig{}, fmt.Errorf("%s: %w", source, err)
	}
	c.Source = source
	return c, nil
}

func parseConfigz(data []byte) (KubeletConfig, error) {
	var answer struct {
		Config json.RawMessage `json:"kubeletconfig"`
	}
	if err := json.Unmarshal(data, &answer); err != nil {
		return KubeletConfig{}, errors.New("the answer is not JSON")
	}
	if len(answer.Config) == 0 || answer.Config[0] != '{' {
		return KubeletConfig{}, errors.New("no \"kubeletconfig\" in the answer")
	}
	return decodeKubeletConfig(answer.Config)
}

// decodeKubeletConfig fills in the defaults of SetDefaults_KubeletConfiguration
// (kubernetes pkg/kubelet/apis/config/v1beta1/defaults.go).
func decodeKubeletConfig(data []byte) (KubeletConfig, error) {
	var f kubeletFileConfig
	if err := json.Unmarshal(data, &f); err != nil {
		var wrong *json.UnmarshalTypeError
		if errors.As(err, &wrong) {
			return KubeletConfig{}, fmt.Errorf("%s: a %s can not stand there", wrong.Field, wrong.Value)
		}
		return KubeletConfig{}, errors.New("not valid JSON")
	}
	c := KubeletConfig{
		EnforcePods:     f.EnforceNodeAllocatable == nil || slices.Contains(f.EnforceNodeAllocatable, "pods"),
		PodPIDsLimit:    -1,
		MaxPods:         110,
		OOMScoreAdj:     -999,
		CgroupRoot:      f.CgroupRoot,
		CgroupsPerQOS:   f.CgroupsPerQOS == nil || *f.CgroupsPerQOS,
		CgroupDriver:    f.CgroupDriver,
		RuntimeEndpoint: f.RuntimeEndpoint,
		TLSCertFile:     f.TLSCertFile,
		VolumePluginDir: cmp.Or(f.VolumePluginDir, defaultVolumePluginDir),
		FeatureGates:    f.FeatureGates,
		FailSwapOn:      f.FailSwapOn == nil || *f.FailSwapOn,
		SwapBehavior:    f.MemorySwap.SwapBehavior,
		EvictsForPIDs:   evictsForPIDs(f.EvictionHard) || evictsForPIDs(f.EvictionSoft),
		ReservesMemory:  reservesMemory(f.SystemReserved) || reservesMemory(f.KubeReserved),
		AllowsCgroupV1:  f.FailCgroupV1 != nil && !*f.FailCgroupV1,
	}
	if f.PodPidsLimit != nil {
		c.PodPIDsLimit = *f.PodPidsLimit
	}
	if f.MaxPods != nil {
		c.MaxPods = *f.MaxPods
	}
	if f.OOMScoreAdj != nil {
		c.OOMScoreAdj = *f.OOMScoreAdj
	}
	var err error
	if c.SystemReservedPIDs, err = reservedPIDs("systemReserved", string(f.SystemReserved["pid"])); err != nil {
		return KubeletConfig{}, err
	}
	if c.KubeReservedPIDs, err = reservedPIDs("kubeReserved", string(f.KubeReserved["pid"])); err != nil {
		return KubeletConfig{}, err
	}
	return c, nil
}

// reservedPIDs parses a quantity such as "1000" or "1k"; empty is none.
func reservedPIDs(what, text string) (int64, error) {
	if text == "" {
		return 0, nil
	}
	// No real quantity is longer, and parsing time grows with the length.
	if len(text) > 32 {
		return 0, fmt.Errorf("%s: pid: too long for a quantity", what)
	}
	q, err := resource.ParseQuantity(text)
	if err != nil || q.Sign() < 0 {
		return 0, fmt.Errorf("%s: pid: %q is no quantity such as 1000", what, text)
	}
	const most = 1 << 40 // far beyond pid_max; keeps sums from overflowing
	return quantityUpTo(q, most), nil
}

// quantityUpTo is a quantity's value, at most what is given: Quantity.Value
// wraps around for what does not fit an int64.
func quantityUpTo(q resource.Quantity, most int64) int64 {
	if q.CmpInt64(most) > 0 {
		return most
	}
	return q.Value()
}

// override lays flags over the configuration and reports whether there were
// any. A flag that holds a map replaces the file's map as a whole, and repeated
// ones add to it (MapStringString of k8s.io/component-base).
func (c *KubeletConfig) override(flags KubeletFlags) (used bool, err error) {
	var wrong []string
	text := func(name string, dst *string) {
		if vs, ok := flags[name]; ok {
			*dst, used = vs[len(vs)-1], true
		}
	}
	number := func(name string, dst *int64) {
		vs, ok := flags[name]
		if !ok {
			return
		}
		n, bad := strconv.ParseInt(vs[len(vs)-1], 0, 64)
		if bad != nil {
			wrong = append(wrong, fmt.Sprintf("--%s: %q is no number", name, vs[len(vs)-1]))
			return
		}
		*dst, used = n, true
	}
	reserved := func(name string, dst *int64) {
		vs, ok := flags[name]
		if !ok {
			return
		}
		used = true
		quantity := ""
		for pair := range strings.SplitSeq(strings.Join(vs, ","), ",") {
			switch k, v, _ := strings.Cut(pair, "="); strings.TrimSpace(k) {
			case "pid":
				quantity = strings.TrimSpace(v)
			case "memory":
				c.ReservesMemory = c.ReservesMemory || strings.Trim(strings.TrimSpace(v), "0") != ""
			}
		}
		n, bad := reservedPIDs("--"+name, quantity)
		if bad != nil {
			wrong = append(wrong, bad.Error())
			return
		}
		*dst = n
	}
	reserved("system-reserved", &c.SystemReservedPIDs)
	reserved("kube-reserved", &c.KubeReservedPIDs)
	number("pod-max-pids", &c.PodPIDsLimit)
	number("max-pods", &c.MaxPods)
	number("oom-score-adj", &c.OOMScoreAdj)
	text("cgroup-root", &c.CgroupRoot)
	text("cgroup-driver", &c.CgroupDriver)
	text("container-runtime-endpoint", &c.RuntimeEndpoint)
	text("tls-cert-file", &c.TLSCertFile)
	text("volume-plugin-dir", &c.VolumePluginDir)
	if vs, ok := flags["enforce-node-allocatable"]; ok {
		c.EnforcePods, used = slices.Contains(strings.Split(strings.Join(vs, ","), ","), "pods"), true
	}
	boolean := func(name string, set func(bool)) {
		vs, ok := flags[name]
		if !ok {
			return
		}
		on, bad := strconv.ParseBool(vs[len(vs)-1])
		if bad != nil {
			wrong = append(wrong, fmt.Sprintf("--%s: %q is neither true nor false", name, vs[len(vs)-1]))
		}
		set(on)
		used = true
	}
	boolean("cgroups-per-qos", func(on bool) { c.CgroupsPerQOS = on })
	boolean("fail-swap-on", func(on bool) { c.FailSwapOn = on })
	boolean("fail-cgroupv1", func(on bool) { c.AllowsCgroupV1 = !on })
	hard, isHard := flags["eviction-hard"]
	soft, isSoft := flags["eviction-soft"]
	if isHard || isSoft {
		// "memory.available<100Mi,pid.available<5%"
		thresholds := strings.Join(slices.Concat(hard, soft), ",")
		c.EvictsForPIDs = c.EvictsForPIDs && !isHard || strings.Contains(thresholds, "pid.available<")
		used = true
	}
	// Gates on the command line add to those in the file and win over them
	// (kubeletConfigFlagPrecedence in cmd/kubelet/app).
	for pair := range strings.SplitSeq(strings.Join(flags["feature-gates"], ","), ",") {
		name, text, _ := strings.Cut(pair, "=")
		if name = strings.TrimSpace(name); name == "" {
			continue
		}
		on, bad := strconv.ParseBool(strings.TrimSpace(text))
		if bad != nil {
			wrong = append(wrong, fmt.Sprintf("--feature-gates: %.60q is neither true nor false", pair))
			continue
		}
		if c.FeatureGates == nil {
			c.FeatureGates = map[string]bool{}
		}
		c.FeatureGates[name], used = on, true
	}
	if wrong != nil {
		return used, errors.New(strings.Join(wrong, "; "))
	}
	return used, nil
}
