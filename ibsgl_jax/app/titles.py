"""What the attribution methods are called before people."""

METHOD_TITLES = {
    "ib": "Information bottleneck",
    "hirescam": "HiResCAM",
    "grad_cam": "Grad-CAM",
    "grad_cam_pp": "Grad-CAM++",
    "layer_cam": "LayerCAM",
    "gradient": "Gradient",
    "input_x_gradient": "Input x gradient",
    "smooth_grad": "SmoothGrad",
    "integrated_gradients": "Integrated Gradients",
    "full_grad": "FullGrad",
    "random": "Random (control)",
}
