package probes

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"slices"
	"strings"
	"time"

	"github.com/hosthygiene/agent/pkg/finding"
)

// flexDriver is a FlexVolume driver in the kubelet's plugin directory
// (kubernetes pkg/volume/flexvolume/probe.go).
type flexDriver struct {
	// Name is that of its folder, "VENDOR~DRIVER" or "DRIVER".
	Name string
	// Broken: the folder lacks its executable.
	Broken bool
	// Used: a pod here has a volume of it, or one is staged.
	Used bool
}

// executable is what the kubelet runs in the driver's folder.
func (d flexDriver) executable() string {
	return d.Name[strings.LastIndex(d.Name, "~")+1:]
}

// flexDrivers is what was found, of one kubelet.
type flexDrivers struct {
	pid   int
	start uint64
	dir   string
	// at is when the drivers were looked at last.
	at      time.Time
	drivers []flexDriver
}

// maxFlexDrivers bounds what is looked at: each is one program the kubelet runs.
const maxFlexDrivers = 64

// checkFlexVolumes looks for FlexVolume drivers that are left in the kubelet's
// plugin directory. Who has volumes of a driver takes a look into the folders of
// every pod, and is remembered for seldomFor.
func (p *diskPass) checkFlexVolumes(ctx context.Context) {
	k := p.mounts.Kubelet
	if k == nil || k.OwnRoot { // its plugin directory is not in the host's tree then
		return
	}
	const key = "flexvolume drivers"
	found, ok := Kept[flexDrivers](p.Memory, key)
	if !ok || found.pid != k.PID || found.start != k.StartTicks {
		found = flexDrivers{pid: k.PID, start: k.StartTicks, dir: defaultVolumePluginDir}
		// Where its settings can not be seen, most have the default.
		if config, err := k.ConfigOnRestart(ctx, p.Host); err == nil {
			found.dir = k.resolve(ctx, p.Host, config.VolumePluginDir)
		}
	}
	if found.at.IsZero() || elapsed(p.Now, found.at, seldomFor) {
		found.at, found.drivers = p.Now, p.flexDrivers(ctx, *k, found.dir)
	}
	p.Memory.Keep(key, found)
	for _, d := range found.drivers {
		if d.Used || p.Now.Sub(p.Memory.Since("flexvolume "+d.Name, p.Now)) < p.LeftoverAfter.D() {
			continue
		}
		folder := found.dir + "/" + d.Name
		f := finding.Finding{
			Reason: "LeftoverFlexVolume", Severity: finding.Info, Subject: shown(d.Name),
			Message:  fmt.Sprintf("the FlexVolume driver %s lies in %s, and no pod here has a volume of it", shown(d.Name), found.dir),
			Evidence: []finding.Evidence{{Source: shown(folder), Observed: "no pod's folder in " + k.RootDir + "/pods has a volume of it"}},
		}
		if d.Broken {
			f.Message = fmt.Sprintf("the folder of the FlexVolume driver %s lies in %s without its executable: the kubelet logs an error each time it looks", shown(d.Name), found.dir)
			f.Evidence = append(f.Evidence, finding.Evidence{Source: shown(folder + "/" + d.executable()), Observed: "not there, or not executable", Expected: "the driver, or no folder"})
		}
		p.tell(f)
	}
}

func (p *diskPass) flexDrivers(ctx context.Context, k Kubelet, dir string) []flexDriver {
	names, err := p.Host.ReadDir(ctx, dir)
	if err != nil {
		p.fail(unlessGone(err))
		return nil
	}
	var drivers []flexDriver
	for _, name := range names {
		if strings.HasPrefix(name, ".") || len(drivers) == maxFlexDrivers {
			continue
		}
		// The kubelet takes directories alone, and no links to one.
		if st, err := p.Host.Lstat(ctx, dir+"/"+name); err != nil || !st.Mode.IsDir() {
			p.fail(unlessGone(err))
			continue
		}
		d := flexDriver{Name: name}
		st, err := p.Host.Stat(ctx, dir+"/"+name+"/"+d.executable())
		switch {
		case err == nil:
			d.Broken = !st.Mode.IsRegular() || st.Mode.Perm()&0o111 == 0
		case errors.Is(err, fs.ErrNotExist):
			d.Broken = true
		default:
			p.fail(err)
		}
		mounts, err := p.Host.ReadDir(ctx, k.RootDir+"/plugins/kubernetes.io/flexvolume/"+strings.ReplaceAll(name, "~", "/")+"/mounts")
		p.fail(unlessGone(err))
		d.Used = len(mounts) > 0
		drivers = append(drivers, d)
	}
	if !slices.ContainsFunc(drivers, func(d flexDriver) bool { return !d.Used }) {
		return drivers
	}
	pods, err := p.Host.ReadDir(ctx, k.RootDir+"/pods")
	p.fail(unlessGone(err))
	for _, pod := range pods {
		volumes, err := p.Host.ReadDir(ctx, k.RootDir+"/pods/"+pod+"/volumes")
		if err != nil {
			p.fail(unlessGone(err))
			continue
		}
		for i, d := range drivers {
			drivers[i].Used = d.Used || slices.Contains(volumes, d.Name)
		}
	}
	return drivers
}
